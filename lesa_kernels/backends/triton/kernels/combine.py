"""Elementwise kernels: out[m] = sum_k c[m, k] * in[k] + d[m] in one pass, `predict`'s form of it, and a copy.

Of Triton only builtins are used: whether a kernel is compiled or interpreted is then this module's affair alone.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton's language is not Python's: mypy does not know its types, and it has no starred tuples.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def positions(numel, skew, BLOCK: tl.constexpr):
    """Return the positions of a program's elements and which of them exist; `skew` is 0 or None, see `skew_of`."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if skew is not None:
        position += skew
    return position, position < numel


@triton.jit
def slot_of(tensor, code, slot_stride):
    """Return the address of a slot of a ring; `code` is 2 * slot + 3.

    Triton compiles integers anew that are 1 or divisible by 16. Odd ones from 3 on are neither, so no slot number does.
    """
    return tensor + ((code >> 1) - 1).to(tl.int64) * slot_stride


@triton.jit
def mixed(held, row, column_stride, offset, K: tl.constexpr):
    """Return sum_k row[k] * held[k] + offset. Fused, whether or not the compiler may fuse by itself."""
    total = held[0] * tl.load(row).to(tl.float32)
    for k in tl.static_range(1, K):
        total = tl.fma(held[k], tl.load(row + k * column_stride).to(tl.float32), total)
    return total + tl.load(offset).to(tl.float32)


@triton.jit
def chosen(values, which, COUNT: tl.constexpr):
    """Return one of a tuple's values by a number that only the running kernel knows; the first for no such number."""
    value = values[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(which == i, values[i], value)
    return value


@triton.jit(do_not_specialize=["coefficients", "offsets", "gain", "rows", "skew"])
def combine(
    inputs,
    input_codes,
    outputs,
    output_codes,
    slot_stride,
    coefficients,
    row_stride,
    column_stride,
    offsets,
    offset_stride,
    gain,
    rows,
    numel,
    skew,
    K: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write forecasts of K features, as many as rows; with a gain, `predict`. What is read is read before all writes.

    One program takes BLOCK elements. Its threads hold their part of all inputs in registers. Outputs, or the codes of
    slots to write, are PLACES; those after the last row stand for nothing.
    """
    position, inside = positions(numel, skew, BLOCK)
    held = ()
    for k in tl.static_range(K):
        source = inputs[k] if input_codes is None else slot_of(inputs[0], input_codes[k], slot_stride)
        held = held + (tl.load(source + position, mask=inside).to(tl.float32),)
    count = 1 if PLACES == 1 else rows
    for m in range(count):
        total = mixed(held, coefficients + m * row_stride, column_stride, offsets + m * offset_stride, K)
        if gain is not None:
            total = held[K - 1] + tl.load(gain).to(tl.float32) * total
        place = chosen(outputs if output_codes is None else output_codes, m, PLACES)
        target = place if output_codes is None else slot_of(outputs[0], place, slot_stride)
        tl.store(target + position, total.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["skew"])
def copy(ring, code, slot_stride, feature, numel, skew, BLOCK: tl.constexpr):
    """Copy a feature into a slot of a ring, converting its dtype."""
    position, inside = positions(numel, skew, BLOCK)
    value = tl.load(feature + position, mask=inside)
    tl.store(slot_of(ring, code, slot_stride) + position, value.to(ring.dtype.element_ty), mask=inside)

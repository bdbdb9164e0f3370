"""`forecast`, `forecast_into` and `push`: elementwise, out[m] = sum_k c[m, k] * in[k] + d[m] in one pass, and a copy.

Tensors that share one dense layout are read as they lie in memory. Of others, inputs are first made contiguous and
slots of a ring are written through a temporary.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005
# mypy does not know the types of Triton's language, which has no starred tuples.

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.backends.triton.launch import (
    BYTES_IN_FLIGHT,
    HELD_FLOATS,
    OPTIONS,
    THREADS,
    blocks_of,
    contiguous,
    is_wide,
    launch,
    on_device_of,
    power_of_2,
    share_dense_layout,
    skew_of,
)
from lesa_kernels.backends.triton.tiles import chosen, positions
from lesa_kernels.ops.contract import MAX_FORECASTS
from lesa_kernels.ops.register import fresh_like

T = TypeVar("T")
# How many outputs a kernel has room for: one serves every M up to that, and picks each in two instructions a place.
PLACES = (1, 8, 16, MAX_FORECASTS)


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


def codes_of(slots: Iterable[int]) -> tuple[int, ...]:
    """Return slot numbers as `slot_of` takes them."""
    return tuple([2 * slot + 3 for slot in slots])


def _block(inputs: int, element_size: int) -> int:
    """Return the elements of one program: with 8 inputs of 16 bits, a thread loads 16 bytes of each."""
    return THREADS * max(min(HELD_FLOATS // power_of_2(inputs), BYTES_IN_FLIGHT // element_size), 1)


def _filled(values: Sequence[T], count: int) -> tuple[T, ...]:
    """Return some values and, up to a count, the first of them again."""
    return (*values, *[values[0]] * (count - len(values)))


def launch_combine(
    op: str,
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    coefficients: Tensor,
    offsets: Tensor,
    gain: Tensor | None = None,
    ring_slots: tuple[Sequence[int], Sequence[int]] | None = None,
) -> None:
    """Launch out[m] = sum_k coefficients[m, k] * in[k] + offsets[m]; with a gain, `predict`.

    Args:
        op: whose launch it is, for error messages.
        inputs: K tensors that are read flat, or the ring alone.
        outputs: M tensors, likewise.
        coefficients: [M, K] or [K].
        offsets: [M] or one element.
        gain: one element or None.
        ring_slots: the slots to read and those to write, where tensors are rings.
    """
    first = inputs[0]
    numel = first.numel()
    if numel == 0:
        return
    count, rows = map(len, ring_slots or (inputs, outputs))
    places = next(each for each in PLACES if each >= rows)
    tensors: tuple[Any, ...]
    if ring_slots is None:
        slot_stride, tensors = 0, (tuple(inputs), None, _filled(outputs, places), None)
    else:
        slot_stride, numel = first.stride(0), numel // first.shape[0]
        tensors = (inputs, codes_of(ring_slots[0]), outputs, _filled(codes_of(ring_slots[1]), places))
    # The stride of a single row or column is any number.
    strides = (
        coefficients.stride(0) if rows > 1 else 0,
        coefficients.stride(-1) if count > 1 else 1,
        offsets.stride(0) if rows > 1 else 0,
    )
    skew = skew_of(numel, inputs if ring_slots else (*inputs, *outputs), slot_stride)
    key = None
    if skew is None:
        types = (first.dtype, coefficients.dtype, offsets.dtype, None if gain is None else gain.dtype)
        sizes = (ring_slots is None, count, places, strides, is_wide(numel), is_wide(slot_stride))
        key = ("combine", first.device, types, sizes)
    block = _block(count, first.element_size())
    parameters = (coefficients, *strides[:2], offsets, strides[2], gain)
    arguments = (*tensors, slot_stride, *parameters, rows, numel, skew, count, places, block)
    with on_device_of(first):
        launch(op, combine, blocks_of(numel, block), arguments, OPTIONS, key)


def forecast(history: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> list[Tensor]:
    """`reference.forecast`; a history that is not contiguous is copied."""
    outputs = [fresh_like(history[0]) for _ in range(coefficients.shape[0])]
    launch_combine("forecast", contiguous(history), outputs, coefficients, offsets)
    return outputs


def forecast_into(
    ring: Tensor, coefficients: Tensor, offsets: Tensor, read: Sequence[int], write: Sequence[int]
) -> None:
    """`reference.forecast_into`; allocates nothing where the slots of the ring are dense."""
    if ring.is_contiguous() or share_dense_layout([ring[0]]):
        launch_combine("forecast_into", (ring,), (ring,), coefficients, offsets, ring_slots=(read, write))
        return
    for slot, row in zip(write, forecast([ring[slot] for slot in read], coefficients, offsets), strict=True):
        ring[slot].copy_(row)


def push(ring: Tensor, feature: Tensor, slot: int) -> None:
    """`reference.push`; where the feature and the slot do not share a dense layout, torch copies."""
    if not share_dense_layout([ring[slot], feature]):
        ring[slot].copy_(feature)
    elif feature.numel() > 0:
        numel, slot_stride = feature.numel(), ring.stride(0)
        skew = skew_of(numel, (ring, feature), slot_stride)
        key = None
        if skew is None:
            key = ("copy", ring.device, ring.dtype, feature.dtype, is_wide(numel), is_wide(slot_stride))
        block = THREADS * BYTES_IN_FLIGHT // max(ring.element_size(), feature.element_size())
        arguments = (ring, *codes_of([slot]), slot_stride, feature, numel, skew, block)
        with on_device_of(ring):
            launch("push", copy, blocks_of(numel, block), arguments, OPTIONS, key)

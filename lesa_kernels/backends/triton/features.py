"""The ops that forecast and move features: check, lay out, launch. What each means stands in `lesa_kernels.reference`.

Tensors that share one dense layout are walked as they lie in memory. Of others, inputs are first made contiguous and
slots of a ring are written through a temporary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor

from lesa_kernels.backends.triton.arguments import (
    blocks_of,
    codes_of,
    contiguous,
    fresh_like,
    is_wide,
    on_device_of,
    power_of_2,
    share_dense_layout,
    skew_of,
)
from lesa_kernels.backends.triton.kernels.combine import combine, copy
from lesa_kernels.backends.triton.launch import launch
from lesa_kernels.ops import contract

T = TypeVar("T")
WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
THREADS = 32 * WARPS
# A thread holds its part of all inputs as floats; beyond this they would not stay in registers.
HELD_FLOATS = 64
# Four loads of 16 bytes in flight saturate memory at the occupancy that the registers allow.
BYTES_IN_FLIGHT = 64
# How many outputs a kernel has room for: one serves every M up to that, and picks each in two instructions a place.
PLACES = (1, 8, 16, contract.MAX_FORECASTS)


def _block(inputs: int, element_size: int) -> int:
    """Return the elements of one program: with 8 inputs of 16 bits, a thread loads 16 bytes of each."""
    return THREADS * max(min(HELD_FLOATS // power_of_2(inputs), BYTES_IN_FLIGHT // element_size), 1)


def _filled(values: Sequence[T], count: int) -> tuple[T, ...]:
    """Return some values and, up to a count, the first of them again."""
    return (*values, *[values[0]] * (count - len(values)))


def _combine(
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
        op: the op that asks for it.
        inputs: K tensors that are walked flat, or the ring alone.
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


def predict(history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """`reference.predict`; a history that is not contiguous is copied."""
    out = fresh_like(history[0])
    _combine("predict", contiguous(history), [out], weight, bias, gain)
    return out


def forecast(history: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> list[Tensor]:
    """`reference.forecast`; a history that is not contiguous is copied."""
    outputs = [fresh_like(history[0]) for _ in range(coefficients.shape[0])]
    _combine("forecast", contiguous(history), outputs, coefficients, offsets)
    return outputs


def forecast_into(
    ring: Tensor, coefficients: Tensor, offsets: Tensor, read: Sequence[int], write: Sequence[int]
) -> None:
    """`reference.forecast_into`; allocates nothing where the slots of the ring are dense."""
    if ring.is_contiguous() or share_dense_layout([ring[0]]):
        _combine("forecast_into", (ring,), (ring,), coefficients, offsets, ring_slots=(read, write))
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

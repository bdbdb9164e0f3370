"""The ops that forecast and move features: check, lay out, launch. What each means stands in `lesa_kernels.reference`.

Tensors that share one dense layout are walked as they lie in memory. Of others, inputs are first made contiguous and
slots of a ring are written through a temporary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor

from lesa_kernels import contract
from lesa_kernels.backends.triton.arguments import (
    blocks_of,
    check_feature,
    check_history,
    codes_of,
    contiguous,
    fresh_like,
    on_device_of,
    power_of_2,
    share_dense_layout,
    skew_of,
)
from lesa_kernels.backends.triton.kernels.combine import combine, copy

T = TypeVar("T")
WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
THREADS = 32 * WARPS
# A thread holds its part of all inputs as floats; beyond this they would not stay in registers.
HELD_FLOATS = 64
# Four loads of 16 bytes in flight saturate memory at the occupancy that the registers allow.
BYTES_IN_FLIGHT = 64
# How many outputs a kernel has room for: one kernel serves every M up to that, and picks an output in 2 M instructions.
PLACES = (1, 8, 16, contract.MAX_FORECASTS)


def _block(inputs: int, element_size: int) -> int:
    """Return the elements of one program: with 8 inputs of 16 bits, a thread loads 16 bytes of each."""
    return THREADS * max(min(HELD_FLOATS // power_of_2(inputs), BYTES_IN_FLIGHT // element_size), 1)


def _filled(values: Sequence[T], count: int) -> tuple[T, ...]:
    """Return some values and, up to a count, the first of them again."""
    return (*values, *[values[0]] * (count - len(values)))


def _combine(
    inputs: Sequence[Tensor],
    outputs: Sequence[Tensor],
    coefficients: Tensor,
    offsets: Tensor,
    gain: Tensor | None = None,
    ring_slots: tuple[Sequence[int], Sequence[int]] | None = None,
) -> None:
    """Launch out[m] = sum_k coefficients[m, k] * in[k] + offsets[m]; with a gain, `predict`.

    Args:
        inputs: K tensors that are walked flat, or the ring alone.
        outputs: M tensors, likewise.
        coefficients: [M, K] or [K].
        offsets: [M] or one element.
        gain: one element or None.
        ring_slots: the slots to read and those to write, where tensors are rings.
    """
    in_ring = ring_slots is not None
    numel = inputs[0][0].numel() if in_ring else inputs[0].numel()
    if numel == 0:
        return
    read, write = map(len, ring_slots or (inputs, outputs))
    places = next(count for count in PLACES if count >= write)
    slot_stride = inputs[0].stride(0) if in_ring else 0
    skew = skew_of(numel, (*inputs, *outputs), slot_stride)
    block = _block(read, inputs[0].element_size())
    with on_device_of(inputs[0]):
        combine[(blocks_of(numel, block),)](
            tuple(inputs),
            codes_of(ring_slots[0]) if ring_slots else None,
            tuple(outputs) if in_ring else _filled(outputs, places),
            _filled(codes_of(ring_slots[1]), places) if ring_slots else None,
            slot_stride,
            coefficients,
            coefficients.stride(0) if coefficients.dim() == 2 else 0,
            coefficients.stride(-1),
            offsets,
            offsets.stride(0) if offsets.dim() == 1 else 0,
            gain,
            write,
            numel,
            skew,
            read,
            places,
            block,
            **OPTIONS,
        )


def predict(history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """`reference.predict`; a history that is not contiguous is copied."""
    check_history("predict", history)
    contract.check_predict("predict", history, weight, bias, gain)
    out = fresh_like(history[0])
    _combine(contiguous(history), [out], weight, bias, gain)
    return out


def forecast(history: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> list[Tensor]:
    """`reference.forecast`; a history that is not contiguous is copied."""
    check_history("forecast", history)
    contract.check_history("forecast", history)
    contract.check_rows("forecast", coefficients, offsets, len(history), "history[0]", history[0])
    outputs = [fresh_like(history[0]) for _ in range(coefficients.shape[0])]
    _combine(contiguous(history), outputs, coefficients, offsets)
    return outputs


def forecast_into(
    ring: Tensor, coefficients: Tensor, offsets: Tensor, read: Sequence[int], write: Sequence[int]
) -> None:
    """`reference.forecast_into`; allocates nothing where the slots of the ring are dense."""
    check_feature("forecast_into", "ring", ring)
    contract.check_forecast_into(ring, coefficients, offsets, read, write)
    contract.check_distinct_elements("forecast_into", "ring", ring)
    contract.check_apart("forecast_into", {"ring": ring}, {"coefficients": coefficients, "offsets": offsets})
    if share_dense_layout([ring[0]]):
        _combine([ring], [ring], coefficients, offsets, ring_slots=(read, write))
        return
    for slot, row in zip(write, forecast([ring[slot] for slot in read], coefficients, offsets), strict=True):
        ring[slot].copy_(row)


def push(ring: Tensor, feature: Tensor, slot: int) -> None:
    """`reference.push`; where the feature and the slot do not share a dense layout, torch copies."""
    check_feature("push", "ring", ring)
    check_feature("push", "feature", feature)
    contract.check_push(ring, feature, slot)
    contract.check_distinct_elements("push", "ring", ring)
    contract.check_copy("push", "feature", ring[slot], feature)
    if not share_dense_layout([ring[slot], feature]):
        ring[slot].copy_(feature)
    elif feature.numel() > 0:
        numel, slot_stride = feature.numel(), ring.stride(0)
        block = THREADS * BYTES_IN_FLIGHT // max(ring.element_size(), feature.element_size())
        with on_device_of(ring):
            copy[(blocks_of(numel, block),)](
                ring,
                *codes_of([slot]),
                slot_stride,
                feature,
                numel,
                skew_of(numel, (ring, feature), slot_stride),
                block,
                **OPTIONS,
            )

"""`forecast`, `forecast_into` and `push`: linear forecasts of features, fresh or in a ring, and copies into a ring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.ops.contract import (
    MAX_FORECASTS,
    MAX_HISTORY,
    check_apart,
    check_device,
    check_distinct_elements,
    check_feature,
    check_features,
    check_parameter,
    shape_of,
    share_memory,
)
from lesa_kernels.ops.numerics import arithmetic_dtype, weighted_sum
from lesa_kernels.ops.register import MakeTensor, Op, declare, fresh_like, save_arguments


def forecast(history: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> list[Tensor]:
    """M forecasts of K features: out[m] = sum_k coefficients[m, k] * history[k] + offsets[m].

    Args:
        history: K tensors [*feature], any strides.
        coefficients: [M, K], float32 or the features' dtype. A coefficient of 0 still multiplies: 0 * NaN is NaN.
        offsets: [M], likewise.

    Returns:
        M fresh contiguous tensors [*feature].
    """
    dtype = arithmetic_dtype(history[0].dtype)
    rows, shifts = coefficients.to(dtype), offsets.to(dtype)
    return [weighted_sum(history, rows[m], shifts[m]).to(history[0].dtype).contiguous() for m in range(rows.shape[0])]


def forecast_into(
    ring: Tensor, coefficients: Tensor, offsets: Tensor, read: Sequence[int], write: Sequence[int]
) -> None:
    """M forecasts of K slots of a ring, written into M slots of it; every read of an element precedes its writes.

    Args:
        ring: [slots, *feature], any strides; its slots must not overlap in memory. Written in place.
        coefficients: [M, K], float32 or the ring's dtype.
        offsets: [M], likewise.
        read: K slots, repeats allowed.
        write: M distinct slots; they may be among those read.
    """
    rows = forecast([ring[slot] for slot in read], coefficients, offsets)
    for slot, row in zip(write, rows, strict=True):
        ring[slot].copy_(row)


def push(ring: Tensor, feature: Tensor, slot: int) -> None:
    """Copy a feature into a slot of a ring, converting its dtype as `Tensor.copy_` does.

    Args:
        ring: [slots, *feature], written in place.
        feature: [*feature], any feature dtype, any strides; it may be the slot, but no other view of it.
        slot: which slot.
    """
    ring[slot].copy_(feature)


def _check_rows(op: str, coefficients: Tensor, offsets: Tensor, inputs: int, like_name: str, like: Tensor) -> None:
    """Check `coefficients` [M, K] and `offsets` [M] for K inputs."""
    if coefficients.dim() != 2 or coefficients.shape[1] != inputs:
        raise ValueError(f"lesa::{op}: coefficients must have shape (M, {inputs}), got {shape_of(coefficients)}")
    rows = coefficients.shape[0]
    if not 1 <= rows <= MAX_FORECASTS:
        raise ValueError(f"lesa::{op}: coefficients must have 1 to {MAX_FORECASTS} rows, got {rows}")
    check_parameter(op, "coefficients", coefficients, (rows, inputs), like_name, like)
    check_parameter(op, "offsets", offsets, (rows,), like_name, like)


def _check_ring(op: str, ring: Tensor) -> None:
    """Check that a ring is a feature tensor with a leading dimension of slots."""
    if ring.dim() < 1:
        raise ValueError(f"lesa::{op}: ring must have shape (slots, *feature), got {shape_of(ring)}")
    check_feature(op, "ring", ring)
    check_distinct_elements(op, "ring", ring)


def _check_slot(op: str, name: str, slot: int, ring: Tensor) -> None:
    """Check that a slot lies in the ring."""
    if not 0 <= slot < ring.shape[0]:
        raise ValueError(f"lesa::{op}: {name} must be a slot in [0, {ring.shape[0]}), got {slot}")


def _check_forecast(op: str, history: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> None:
    """Check the arguments of `forecast`."""
    check_features(op, "history", history)
    _check_rows(op, coefficients, offsets, len(history), "history[0]", history[0])


def _check_forecast_into(
    op: str, ring: Tensor, coefficients: Tensor, offsets: Tensor, read: Sequence[int], write: Sequence[int]
) -> None:
    """Check the arguments of `forecast_into`: all slots lie in the ring, those to write are distinct."""
    _check_ring(op, ring)
    if not 1 <= len(read) <= MAX_HISTORY:
        raise ValueError(f"lesa::{op}: read must name 1 to {MAX_HISTORY} slots, got {len(read)}")
    for position, slot in enumerate(read):
        _check_slot(op, f"read[{position}]", slot, ring)
    _check_rows(op, coefficients, offsets, len(read), "ring", ring)
    rows = coefficients.shape[0]
    if len(write) != rows:
        raise ValueError(f"lesa::{op}: write must name {rows} slots (the rows of coefficients), got {len(write)}")
    for position, slot in enumerate(write):
        _check_slot(op, f"write[{position}]", slot, ring)
        if slot in write[:position]:
            raise ValueError(f"lesa::{op}: write must name distinct slots, got slot {slot} twice")
    check_apart(op, "ring", ring, {"coefficients": coefficients, "offsets": offsets})


def _check_push(op: str, ring: Tensor, feature: Tensor, slot: int) -> None:
    """Check the arguments of `push`: the feature is the slot or shares no memory with it."""
    _check_ring(op, ring)
    check_feature(op, "feature", feature)
    if feature.shape != ring.shape[1:]:
        wanted = tuple(ring.shape[1:])
        raise ValueError(f"lesa::{op}: feature must have shape {wanted} like a slot of ring, got {shape_of(feature)}")
    check_device(op, "feature", feature, "ring", ring)
    _check_slot(op, "slot", slot, ring)
    written = ring[slot]
    if share_memory(feature, written) and not _is_same_view(feature, written):
        raise ValueError(
            f"lesa::{op}: feature must be the slot that it is written to or share no memory with it, "
            f"got another view of it that starts {feature.data_ptr() - written.data_ptr()} bytes after the slot"
        )


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    """Return whether each element of a tensor lies where another of its shape has the same one."""
    strides = zip(a.shape, a.stride(), b.stride(), strict=True)
    same_strides = all(size == 1 or one == other for size, one, other in strides)
    return a.data_ptr() == b.data_ptr() and a.element_size() == b.element_size() and same_strides


def _fake(history: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> list[Tensor]:
    """Return M features."""
    return [fresh_like(history[0]) for _ in range(coefficients.shape[0])]


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """Return the transpose of a linear map: the history's gradients are a forecast of the outputs' gradients."""
    *history, coefficients, offsets = ctx.saved_tensors
    history_wanted, coefficients_wanted, offsets_wanted = ctx.needs_input_grad
    filled = [torch.zeros_like(history[0]) if grad is None else grad for grad in grads]
    grad_history: list[Tensor | None] = [None] * len(history)
    if any(history_wanted):
        zeros = coefficients.new_zeros(len(history))
        grad_history = torch.ops.lesa.forecast(filled, coefficients.t().contiguous(), zeros)
    dtype = arithmetic_dtype(history[0].dtype)
    wide = [grad.to(dtype) for grad in filled] if coefficients_wanted or offsets_wanted else []
    grad_coefficients = grad_offsets = None
    if coefficients_wanted:
        products = [torch.stack([(g * feature.to(dtype)).sum() for feature in history]) for g in wide]
        grad_coefficients = torch.stack(products).to(coefficients.dtype)
    if offsets_wanted:
        grad_offsets = torch.stack([g.sum() for g in wide]).to(offsets.dtype)
    return grad_history, grad_coefficients, grad_offsets


def _example_forecast(tensor: MakeTensor, shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Make valid arguments."""
    return [tensor(*shape) for _ in range(4)], tensor(3, 4), tensor(3)


def _example_forecast_into(
    tensor: MakeTensor, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, list[int], list[int]]:
    """Make valid arguments."""
    return tensor(5, *shape), tensor(2, 3), tensor(2), [0, 1, 2], [2, 4]


def _example_push(tensor: MakeTensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, int]:
    """Make valid arguments."""
    return tensor(5, *shape), tensor(*shape), 2


declare(
    Op(
        "forecast(Tensor[] history, Tensor coefficients, Tensor offsets) -> Tensor[]",
        forecast,
        _check_forecast,
        _example_forecast,
        _fake,
        _backward,
        save_arguments,
    )
)
declare(
    Op(
        "forecast_into(Tensor(a!) ring, Tensor coefficients, Tensor offsets, int[] read, int[] write) -> ()",
        forecast_into,
        _check_forecast_into,
        _example_forecast_into,
    )
)
declare(Op("push(Tensor(a!) ring, Tensor feature, int slot) -> ()", push, _check_push, _example_push))

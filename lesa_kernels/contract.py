"""Argument checks of the ops, in Python: what the reference and the fakes enforce (csrc/contract.h is the C++ twin).

Every message says the op, the argument, what is required and what came. K is the history length, M the number of
forecasts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

MAX_HISTORY = 64
MAX_FORECASTS = 64
FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def arithmetic_dtype(features: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are kept in: float32, or float64 for float64 features."""
    return torch.float64 if features == torch.float64 else torch.float32


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(map(_name, dtypes))


def check_plain(op: str, arguments: Mapping[str, object]) -> None:
    """Check that all tensors among the arguments of an op are there, and dense.

    Raises:
        TypeError: for None and for another layout.
    """
    for name, value in arguments.items():
        listed = isinstance(value, list | tuple)
        for k, each in enumerate(value if listed else [value]):  # type: ignore[arg-type, var-annotated]
            place = f"{name}[{k}]" if listed else name
            if each is None:
                raise TypeError(f"lesa::{op}: {place} must be a tensor, got None")
            if isinstance(each, Tensor) and (each.layout != torch.strided or each.is_quantized or each.is_nested):
                kind = "quantized" if each.is_quantized else "nested" if each.is_nested else str(each.layout)
                raise TypeError(f"lesa::{op}: {place} must be a dense (strided) tensor, got a {kind} one")


def check_feature(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor is of a feature dtype.

    Raises:
        TypeError: for another dtype.
    """
    if tensor.dtype not in FEATURE_DTYPES:
        raise TypeError(f"lesa::{op}: {name} must have a dtype of {_names(FEATURE_DTYPES)}, got {_name(tensor.dtype)}")


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Check that a tensor has the shape, dtype and device of another.

    Raises:
        ValueError: for another shape or device.
        TypeError: for another dtype.
    """
    if tensor.shape != like.shape:
        raise ValueError(f"lesa::{op}: {name} must have shape {_shape(like)} like {like_name}, got {_shape(tensor)}")
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"lesa::{op}: {name} must have dtype {_name(like.dtype)} like {like_name}, got {_name(tensor.dtype)}"
        )
    check_device(op, name, tensor, like_name, like)


def check_gradient(op: str, grad: Tensor, shape: tuple[int, ...], like_name: str, like: Tensor) -> None:
    """Check the gradient of an output: its shape, dtype and device of another.

    Raises:
        ValueError: for another shape or device.
        TypeError: for another dtype.
    """
    if tuple(grad.shape) != shape:
        raise ValueError(f"lesa::{op}: grad must have shape {shape}, got {_shape(grad)}")
    if grad.dtype != like.dtype:
        raise TypeError(
            f"lesa::{op}: grad must have dtype {_name(like.dtype)} like {like_name}, got {_name(grad.dtype)}"
        )
    check_device(op, "grad", grad, like_name, like)


def check_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Check that a tensor lies where another does.

    Raises:
        ValueError: for another device.
    """
    if tensor.device != like.device:
        raise ValueError(f"lesa::{op}: {name} must be on {like.device} like {like_name}, got {tensor.device}")


def check_features(op: str, name: str, features: Sequence[Tensor]) -> None:
    """Check that an argument holds 1 to 64 features of one shape, dtype and device.

    Raises:
        ValueError: for a wrong count, shape or device.
        TypeError: for a wrong dtype.
    """
    if not 1 <= len(features) <= MAX_HISTORY:
        raise ValueError(f"lesa::{op}: {name} must hold 1 to {MAX_HISTORY} tensors, got {len(features)}")
    check_feature(op, f"{name}[0]", features[0])
    for k in range(1, len(features)):
        check_like(op, f"{name}[{k}]", features[k], f"{name}[0]", features[0])


def check_history(op: str, history: Sequence[Tensor]) -> None:
    """Check a history as `check_features` does."""
    check_features(op, "history", history)


def check_parameter(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...] | None, like_name: str, like: Tensor
) -> None:
    """Check a parameter: its shape (None: any shape of one element), dtype float32 or the features', their device.

    Raises:
        ValueError: for a wrong shape or device.
        TypeError: for a wrong dtype.
    """
    if shape is None:
        if tensor.numel() != 1:
            raise ValueError(f"lesa::{op}: {name} must hold one element, got shape {_shape(tensor)}")
    elif tuple(tensor.shape) != shape:
        raise ValueError(f"lesa::{op}: {name} must have shape {shape}, got {_shape(tensor)}")
    if tensor.dtype not in (torch.float32, like.dtype):
        allowed = "float32" if like.dtype == torch.float32 else f"float32 or {_name(like.dtype)}"
        raise TypeError(f"lesa::{op}: {name} must have dtype {allowed} ({like_name}'s), got {_name(tensor.dtype)}")
    check_device(op, name, tensor, like_name, like)


def check_predict(op: str, history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> None:
    """Check the arguments that `predict` and its relatives share."""
    check_history(op, history)
    check_parameter(op, "weight", weight, (len(history),), "history[0]", history[0])
    check_parameter(op, "bias", bias, None, "history[0]", history[0])
    check_parameter(op, "gain", gain, None, "history[0]", history[0])


def check_rows(op: str, coefficients: Tensor, offsets: Tensor, num_inputs: int, like_name: str, like: Tensor) -> None:
    """Check `coefficients` [M, K] and `offsets` [M] for K inputs, 1 <= M <= 64."""
    if coefficients.dim() != 2 or coefficients.shape[1] != num_inputs:
        raise ValueError(f"lesa::{op}: coefficients must have shape (M, {num_inputs}), got {_shape(coefficients)}")
    rows = coefficients.shape[0]
    if not 1 <= rows <= MAX_FORECASTS:
        raise ValueError(f"lesa::{op}: coefficients must have 1 to {MAX_FORECASTS} rows, got {rows}")
    check_parameter(op, "coefficients", coefficients, (rows, num_inputs), like_name, like)
    check_parameter(op, "offsets", offsets, (rows,), like_name, like)


def check_ring(op: str, ring: Tensor) -> None:
    """Check that a ring is a feature tensor with a leading dimension of slots."""
    if ring.dim() < 1:
        raise ValueError(f"lesa::{op}: ring must have shape (slots, *feature), got {_shape(ring)}")
    check_feature(op, "ring", ring)


def check_distinct_elements(op: str, name: str, tensor: Tensor) -> None:
    """Check that no two elements of a tensor that is written share memory, as those of `expand` and `unfold` do.

    Raises:
        ValueError: when two do.
    """
    if tensor.is_contiguous():
        return
    dims = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    for a, (_, stride_a) in enumerate(dims):
        for b, (size_b, stride_b) in enumerate(dims):
            meets = stride_b == 0 or (a != b and stride_a % stride_b == 0 and stride_a // stride_b < size_b)
            if meets and tensor.numel() > 0:
                raise ValueError(
                    f"lesa::{op}: {name} must not overlap itself in memory, got strides {tensor.stride()} "
                    f"for shape {_shape(tensor)}"
                )


def check_slot(op: str, name: str, slot: int, ring: Tensor) -> None:
    """Check that a slot number lies in the ring.

    Raises:
        ValueError: when it does not.
    """
    if not 0 <= slot < ring.shape[0]:
        raise ValueError(f"lesa::{op}: {name} must be a slot in [0, {ring.shape[0]}), got {slot}")


def check_forecast_into(
    ring: Tensor, coefficients: Tensor, offsets: Tensor, read: Sequence[int], write: Sequence[int]
) -> None:
    """Check `forecast_into`: K slots to read, M distinct slots to write, all inside the ring."""
    op = "forecast_into"
    check_ring(op, ring)
    _check_read(op, read, ring)
    check_rows(op, coefficients, offsets, len(read), "ring", ring)
    if len(write) != coefficients.shape[0]:
        raise ValueError(
            f"lesa::{op}: write must name {coefficients.shape[0]} slots (the rows of coefficients), got {len(write)}"
        )
    for position, slot in enumerate(write):
        check_slot(op, f"write[{position}]", slot, ring)
        if slot in write[:position]:
            raise ValueError(f"lesa::{op}: write must name distinct slots, got slot {slot} twice")


def _check_read(op: str, read: Sequence[int], ring: Tensor) -> None:
    if not 1 <= len(read) <= MAX_HISTORY:
        raise ValueError(f"lesa::{op}: read must name 1 to {MAX_HISTORY} slots, got {len(read)}")
    for position, slot in enumerate(read):
        check_slot(op, f"read[{position}]", slot, ring)


def check_push(ring: Tensor, feature: Tensor, slot: int) -> None:
    """Check `push`: a feature of the ring's feature shape and device, any feature dtype."""
    check_ring("push", ring)
    check_feature("push", "feature", feature)
    if feature.shape != ring.shape[1:]:
        raise ValueError(
            f"lesa::push: feature must have shape {tuple(ring.shape[1:])} like a slot of ring, got {_shape(feature)}"
        )
    check_device("push", "feature", feature, "ring", ring)
    check_slot("push", "slot", slot, ring)


def check_copy(op: str, name: str, written: Tensor, read: Tensor) -> None:
    """Check that a copy goes onto itself or elsewhere; where strides interleave, the caller answers for it.

    Raises:
        ValueError: when contiguous memory of the two overlaps in part.
    """
    if written.is_meta or not (written.is_contiguous() and read.is_contiguous()):
        return
    to, start = written.data_ptr(), read.data_ptr()
    to_end, end = (at.data_ptr() + at.numel() * at.element_size() for at in (written, read))
    if (to, to_end) == (start, end):
        return
    if to < end and start < to_end:
        raise ValueError(
            f"lesa::{op}: {name} must not overlap a part of the slot that it is written to, "
            f"got memory {start - to} bytes after the slot's"
        )


def check_apart(op: str, written: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> None:
    """Check that what is written shares no memory with other arguments.

    Where both have gaps, only a common first element is found: they may interleave.

    Raises:
        ValueError: when memory of two overlaps.
    """
    spans = [(name, _span(tensor)) for name, tensor in (*written.items(), *read.items()) if tensor.numel()]
    for position, (name, (start, end, dense)) in enumerate(spans):
        if name not in written:
            return
        for other_name, (at, other_end, other_dense) in spans[position + 1 :]:
            if start == at or (start < other_end and at < end and dense and other_dense):
                raise ValueError(
                    f"lesa::{op}: {name} must not share memory with {other_name}, "
                    f"got memory that starts {start - at} bytes after its start"
                )


def _span(tensor: Tensor) -> tuple[int, int, bool]:
    """Return where the memory of a tensor starts, where it ends, and whether it has no gaps."""
    start, count = tensor.data_ptr(), tensor.numel()
    if tensor.is_contiguous():
        return start, start + count * tensor.element_size(), True
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + extent * tensor.element_size(), extent == count


def check_kan_linear(
    op: str, x: Tensor, grid: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor
) -> None:
    """Check a KAN layer of I inputs, O outputs and B bases; for the shapes see `reference.kan_linear`."""
    check_feature(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"lesa::{op}: x must have shape (..., inputs), got {_shape(x)}")
    inputs = x.shape[-1]
    if base_weight.dim() != 2 or base_weight.shape[1] != inputs:
        raise ValueError(f"lesa::{op}: base_weight must have shape (outputs, {inputs}), got {_shape(base_weight)}")
    outputs = base_weight.shape[0]
    if spline_weight.dim() != 3 or tuple(spline_weight.shape[:2]) != (outputs, inputs) or spline_weight.shape[2] < 1:
        raise ValueError(
            f"lesa::{op}: spline_weight must have shape ({outputs}, {inputs}, bases), got {_shape(spline_weight)}"
        )
    bases = spline_weight.shape[2]
    if grid.dim() != 2 or grid.shape[0] != inputs or grid.shape[1] < bases + 1:
        raise ValueError(f"lesa::{op}: grid must have shape ({inputs}, {bases} + order + 1), got {_shape(grid)}")
    check_parameter(op, "grid", grid, (inputs, grid.shape[1]), "x", x)
    check_parameter(op, "base_weight", base_weight, (outputs, inputs), "x", x)
    check_parameter(op, "spline_weight", spline_weight, (outputs, inputs, bases), "x", x)
    check_parameter(op, "spline_scaler", spline_scaler, (outputs, inputs), "x", x)

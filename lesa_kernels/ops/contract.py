"""Checks the arguments of ops, where several families share a check (csrc/contract.h is the same contract in C++).

Every message says the op, the argument, what is required and what came. A check raises TypeError for a wrong kind of
argument (None, layout, dtype) and ValueError for a wrong count, shape, device, slot or memory; `register.Op` makes a
RuntimeError of both, which is what `torch.ops.lesa` raises. K is the history length, M the number of forecasts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

MAX_HISTORY = 64
MAX_FORECASTS = 64
# float64 on the CPU only.
FEATURE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def shape_of(tensor: Tensor) -> str:
    """Return a shape as messages write it."""
    return str(tuple(tensor.shape))


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype as messages write it."""
    return str(dtype).removeprefix("torch.")


def check_dense(op: str, name: str, tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Check that an argument holds tensors that are there, strided and not quantized."""
    if not isinstance(tensors, (list, tuple)):
        if tensors is None or tensors.layout is not torch.strided or tensors.is_quantized:  # type: ignore[union-attr]
            _refuse_layout(op, name, tensors)  # type: ignore[arg-type]
        return
    for k, tensor in enumerate(tensors):
        if tensor.layout is not torch.strided or tensor.is_quantized:
            _refuse_layout(op, f"{name}[{k}]", tensor)


def _refuse_layout(op: str, name: str, tensor: Tensor | None) -> None:
    """Refuse what `check_dense` found."""
    if tensor is None:
        raise TypeError(f"lesa::{op}: {name} must be a tensor, got None")
    kind = "quantized" if tensor.is_quantized else str(tensor.layout)
    raise TypeError(f"lesa::{op}: {name} must be a dense (strided) tensor, got a {kind} one")


def check_feature(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor is of a feature dtype."""
    dtypes = FEATURE_DTYPES if tensor.is_cpu else FEATURE_DTYPES[:-1]
    if tensor.dtype not in dtypes:
        allowed = ", ".join(map(name_of, dtypes))
        raise TypeError(f"lesa::{op}: {name} must have a dtype of {allowed}, got {name_of(tensor.dtype)}")


def check_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Check that a tensor lies where another does."""
    if tensor.device != like.device:
        raise ValueError(f"lesa::{op}: {name} must be on {like.device} like {like_name}, got {tensor.device}")


def check_like(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """Check that a tensor has the shape, dtype and device of another."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"lesa::{op}: {name} must have shape {shape_of(like)} like {like_name}, got {shape_of(tensor)}"
        )
    if tensor.dtype != like.dtype:
        raise TypeError(
            f"lesa::{op}: {name} must have dtype {name_of(like.dtype)} like {like_name}, got {name_of(tensor.dtype)}"
        )
    check_device(op, name, tensor, like_name, like)


def check_features(op: str, name: str, features: Sequence[Tensor]) -> None:
    """Check that an argument holds 1 to 64 features of one shape, dtype and device."""
    if not 1 <= len(features) <= MAX_HISTORY:
        raise ValueError(f"lesa::{op}: {name} must hold 1 to {MAX_HISTORY} tensors, got {len(features)}")
    first = features[0]
    check_feature(op, f"{name}[0]", first)
    shape, dtype, device = first.shape, first.dtype, first.device
    for k, feature in enumerate(features):
        if feature.shape != shape or feature.dtype != dtype or feature.device != device:
            check_like(op, f"{name}[{k}]", feature, f"{name}[0]", first)


def check_parameter(
    op: str, name: str, tensor: Tensor, shape: tuple[int, ...] | None, like_name: str, like: Tensor
) -> None:
    """Check a parameter: its shape (None: any shape of one element), dtype float32 or the features', their device."""
    if shape is None:
        if tensor.numel() != 1:
            raise ValueError(f"lesa::{op}: {name} must hold one element, got shape {shape_of(tensor)}")
    elif tensor.shape != shape:
        raise ValueError(f"lesa::{op}: {name} must have shape {shape}, got {shape_of(tensor)}")
    if tensor.dtype not in (torch.float32, like.dtype):
        allowed = "float32" if like.dtype == torch.float32 else f"float32 or {name_of(like.dtype)}"
        raise TypeError(f"lesa::{op}: {name} must have dtype {allowed} ({like_name}'s), got {name_of(tensor.dtype)}")
    check_device(op, name, tensor, like_name, like)


def has_memory(tensor: Tensor) -> bool:
    """Return whether a tensor is real, so that its memory can be compared with another's."""
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)


def check_distinct_elements(op: str, name: str, tensor: Tensor) -> None:
    """Check that no two elements of a tensor that is written share memory, as those of `expand` and `unfold` do."""
    if not has_memory(tensor) or tensor.is_contiguous() or tensor.numel() == 0:
        return
    dims = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    for a, (_, stride_a) in enumerate(dims):
        for b, (size_b, stride_b) in enumerate(dims):
            if stride_b == 0 or (a != b and stride_a % stride_b == 0 and stride_a // stride_b < size_b):
                raise ValueError(
                    f"lesa::{op}: {name} must not overlap itself in memory, got strides {tensor.stride()} "
                    f"for shape {shape_of(tensor)}"
                )


def check_apart(op: str, name: str, written: Tensor, others: Mapping[str, Tensor]) -> None:
    """Check that what is written shares no memory with other arguments.

    Where both have gaps, only a common first element is found: they may interleave.
    """
    if not has_memory(written) or written.numel() == 0:
        return
    start = written.data_ptr()
    end = start + written.numel() * written.element_size()
    for other_name, other in others.items():
        at, count = other.data_ptr(), other.numel()
        meets = count > 0 and start < at + count * other.element_size() and at < end
        if meets and (start == at or (is_dense(written) and is_dense(other))):
            raise ValueError(
                f"lesa::{op}: {name} must not share memory with {other_name}, "
                f"got memory that starts {start - at} bytes after its start"
            )


def is_dense(tensor: Tensor) -> bool:
    """Return whether the memory of a tensor has no gaps."""
    if tensor.is_contiguous():
        return True
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return reach == tensor.numel()


def numbered(name: str, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a list by the names that messages give them."""
    return {f"{name}[{k}]": tensor for k, tensor in enumerate(tensors)}

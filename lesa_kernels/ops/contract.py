"""Checks the arguments of ops, where several families share a check (csrc/contract.h is the same contract in C++).

Every message says the op, the argument, what is required and what came. A check raises TypeError for a wrong kind of
argument (None, layout, dtype) and ValueError for a wrong count, shape, device, slot or memory; `register.Op` makes a
RuntimeError of both, which is what `torch.ops.lesa` raises. K is the history length, M the number of forecasts.
"""

from __future__ import annotations

import sys
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
    """Check that an argument holds tensors that are there, strided, not quantized and not spread over processes."""
    if not isinstance(tensors, (list, tuple)):
        if tensors is None or not _is_dense(tensors):  # type: ignore[arg-type]
            _refuse_layout(op, name, tensors)  # type: ignore[arg-type]
        return
    for k, tensor in enumerate(tensors):
        if not _is_dense(tensor):
            _refuse_layout(op, f"{name}[{k}]", tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Return whether a tensor is what `check_dense` wants."""
    return tensor.layout is torch.strided and not tensor.is_quantized and not _is_spread(tensor)


def _is_spread(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor; its module takes long to import, and made it if it is one."""
    module = None if type(tensor) is Tensor else sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _refuse_layout(op: str, name: str, tensor: Tensor | None) -> None:
    """Refuse what `check_dense` found."""
    if tensor is None:
        raise TypeError(f"lesa::{op}: {name} must be a tensor, got None")
    if _is_spread(tensor):
        raise TypeError(
            f"lesa::{op}: {name} must be a tensor of one process, got a DTensor; to_local() is its part here"
        )
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
    return not (
        tensor.is_meta or isinstance(tensor, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def check_distinct_elements(op: str, name: str, tensor: Tensor) -> None:
    """Check that no two elements of a tensor that is written share memory, as those of `expand` and `unfold` do.

    A layout that only `as_strided` makes, of strides that the smaller ones reach beyond, is refused without a search.
    """
    if not has_memory(tensor) or tensor.is_contiguous() or tensor.numel() == 0:
        return
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                f"lesa::{op}: {name} must not overlap itself in memory, got strides {tensor.stride()} "
                f"for shape {shape_of(tensor)}"
            )
        reach += stride * (size - 1)


def check_apart(op: str, name: str, written: Tensor, others: Mapping[str, Tensor]) -> None:
    """Check that what is written shares no memory with other arguments."""
    for other_name, other in others.items():
        if share_memory(written, other):
            raise ValueError(
                f"lesa::{op}: {name} must not share memory with {other_name}, "
                f"got memory that starts {written.data_ptr() - other.data_ptr()} bytes after its start"
            )


# Slices and permutations of one tensor leave a few places at a time; only `as_strided` makes layouts that leave more.
_MOST_PLACES = 1000


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are real and have a byte in common.

    Elements of both may interleave, as columns do: the places of a byte are sums of multiples of strides, and what is
    looked for are two equal ones. Where that takes long, the answer is yes.
    """
    if a.numel() == 0 or b.numel() == 0 or not (has_memory(a) and has_memory(b)):
        return False
    distance = b.data_ptr() - a.data_ptr()
    if not -_extent_of(b) < distance < _extent_of(a):
        return False
    # Stride in bytes -> how often it may be added, from least to most; 1 is that of the bytes of an element.
    terms = {1: [1 - b.element_size(), a.element_size() - 1]}
    for tensor, end, sign in ((a, 1, 1), (b, 0, -1)):
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            terms.setdefault(stride * tensor.element_size(), [0, 0])[end] += sign * (size - 1)
    largest_first = sorted(((stride, *counts) for stride, counts in terms.items() if stride > 0), reverse=True)
    places = {distance}
    for position, (stride, least, most) in enumerate(largest_first):
        rest = largest_first[position + 1 :]
        low, high = (sum(term[0] * term[end] for term in rest) for end in (1, 2))
        reached: set[int] = set()
        for place in places:
            fewest, highest = max(least, -((high - place) // stride)), min(most, (place - low) // stride)
            if len(reached) + highest - fewest >= _MOST_PLACES:
                return True
            reached.update(place - stride * count for count in range(fewest, highest + 1))
        places = reached
    return 0 in places


def _extent_of(tensor: Tensor) -> int:
    """Return the bytes from the first element of a tensor to behind its last one."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + reach) * tensor.element_size()


def numbered(name: str, tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a list by the names that messages give them."""
    return {f"{name}[{k}]": tensor for k, tensor in enumerate(tensors)}

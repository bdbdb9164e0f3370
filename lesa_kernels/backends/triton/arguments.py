"""What the launchers share: checks, layouts, the device of a launch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor


def _dense_strides(tensor: Tensor) -> list[tuple[int, int]] | None:
    """Return each dimension of more than one element with its stride; None where memory has gaps or overlaps."""
    strides = [(d, stride) for d, stride in enumerate(tensor.stride()) if tensor.shape[d] > 1]
    reached = 1
    for d, stride in sorted(strides, key=lambda entry: entry[1]):
        if stride != reached:
            return None
        reached *= tensor.shape[d]
    return strides


def share_dense_layout(tensors: Sequence[Tensor]) -> bool:
    """Return whether tensors of one shape are contiguous or permuted alike: then memory can be walked in its order."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    strides = _dense_strides(tensors[0])
    return strides is not None and all(_dense_strides(tensor) == strides for tensor in tensors[1:])


def walkable(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors of one shape as they are where they share a dense layout, contiguous copies otherwise."""
    return tuple(tensors) if share_dense_layout(tensors) else contiguous(tensors)


def contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors, copied where they are not contiguous."""
    return tuple([tensor.contiguous() for tensor in tensors])


def fresh_like(tensor: Tensor) -> Tensor:
    """Return a fresh contiguous tensor of another's shape, dtype and device."""
    return tensor.new_empty(tensor.shape)


def skew_of(numel: int, tensors: Iterable[Tensor], slot_stride: int = 0) -> int | None:
    """Return None where all accesses can be vectors of 16 bytes, else 0: the same number, but unknown to the compiler.

    Triton goes by the alignment of pointers and numbers. Added to positions, an unknown number makes all accesses those
    of single elements. Without, a mix of both is exchanged through shared memory and compiled anew for every pattern.
    """
    if numel % 16 == 0 and slot_stride % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors):
        return None
    return 0


def codes_of(slots: Iterable[int]) -> tuple[int, ...]:
    """Return slot numbers as `kernels.combine.slot_of` takes them."""
    return tuple([2 * slot + 3 for slot in slots])


def is_wide(number: int) -> bool:
    """Return whether Triton passes a number in 64 bits."""
    return number >= 2**31


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on a tensor's device; it asks torch for the current one."""
    return torch.accelerator.device_index(tensor.device.index)


def power_of_2(count: int) -> int:
    """Return the smallest power of two that is not below a count, and 1 for 0."""
    return 1 << max(count - 1, 0).bit_length()


def blocks_of(count: int, size: int) -> int:
    """Return how many blocks of a size hold a count."""
    return -(-count // size)

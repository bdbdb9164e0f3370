"""Launches Triton's kernels: remembers those that ops call often, and refuses to load one while a graph is captured.

Below it, what launchers need to know of layouts, alignments and sizes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

WARPS = 4
THREADS = 32 * WARPS
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
# A thread holds its part of all inputs as floats; beyond this they would not stay in registers.
HELD_FLOATS = 64
# Of a thread: four loads of 16 bytes saturate memory at the occupancy that the registers allow.
BYTES_IN_FLIGHT = 64

# What `kernel[grid](...)` returned. Called directly, it does not look at all arguments again.
_compiled: dict[Hashable, Any] = {}


def is_capturing() -> bool:
    """Return whether the current stream is captured in a graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def launch(
    op: str,
    kernel: Any,
    programs: int,
    arguments: tuple[Any, ...],
    options: Mapping[str, Any],
    key: Hashable | None = None,
) -> None:
    """Launch a kernel on the current device.

    Args:
        op: whose launch it is, for the error message.
        kernel: what `triton.jit` made.
        programs: how many run.
        arguments: all that the kernel takes, in order.
        options: Triton's, such as the warps of a program.
        key: what determines the kernel that Triton compiles: its name, device, types of tensors, constants; whether a
            number is 1, a multiple of 16, or of 64 bits; whether a pointer is a multiple of 16. The last two are left
            out where they are the same for all calls, or named in `do_not_specialize`. None: Triton looks itself.

    Raises:
        RuntimeError: when a graph is captured and the kernel is not loaded.
    """
    grid = (programs, 1, 1)
    if key is not None and (known := _compiled.get(key)) is not None:
        known[grid](*arguments)
        return
    if is_capturing() and kernel.warmup(*arguments, grid=grid, **options).module is None:
        raise RuntimeError(
            f"lesa::{op}: its Triton kernel must be loaded before a graph is captured: "
            "call the op once with the same arguments first"
        )
    compiled = kernel[grid](*arguments, **options)
    if key is not None and compiled is not None:  # Triton's interpreter returns None
        _compiled[key] = compiled


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
    """Return whether tensors of one shape are contiguous or permuted alike: then memory can be read in its order."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    strides = _dense_strides(tensors[0])
    return strides is not None and all(_dense_strides(tensor) == strides for tensor in tensors[1:])


def in_memory_order(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors of one shape as they are where they share a dense layout, contiguous copies otherwise."""
    return tuple(tensors) if share_dense_layout(tensors) else contiguous(tensors)


def contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return tensors, copied where they are not contiguous."""
    return tuple([tensor.contiguous() for tensor in tensors])


def skew_of(numel: int, tensors: Iterable[Tensor], slot_stride: int = 0) -> int | None:
    """Return None where all accesses can be vectors of 16 bytes, else 0: the same number, but unknown to the compiler.

    Triton goes by the alignment of pointers and numbers. Added to positions, an unknown number makes all accesses those
    of single elements. Without, a mix of both is exchanged through shared memory and compiled anew for every pattern.
    """
    if numel % 16 == 0 and slot_stride % 16 == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in tensors):
        return None
    return 0


def is_wide(number: int) -> bool:
    """Return whether Triton passes a number in 64 bits."""
    return number >= 2**31


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which a tensor's device is torch's current one, on which Triton launches."""
    return torch.accelerator.device_index(tensor.device.index)


def power_of_2(count: int) -> int:
    """Return the smallest power of two that is not below a count, and 1 for 0."""
    return 1 << max(count - 1, 0).bit_length()


def blocks_of(count: int, size: int) -> int:
    """Return how many blocks of a size hold a count."""
    return -(-count // size)

"""Launches Triton's kernels: refuses to load one while a graph is captured, and remembers those that ops call often."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch

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
        op: the op that asks for it, for the error message.
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

"""Reads tensors from what models take and return, and compares and rebuilds their outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from lesa_kernels.guidance import is_doubled

# The tail of a compiled model is fused in another way than the same tail behind its blocks.
_TAIL_TOLERANCE = 1e-2

Layout: TypeAlias = tuple[tuple[int, ...], torch.dtype, torch.device]
"""Shape, dtype and device."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(recursive: bool = True) -> Callable[[_Function], _Function]:
    """Keep a function out of the graphs of torch.compile, and with `recursive` all that it calls."""
    decorator: Callable[[_Function], _Function] = torch.compiler.disable(recursive=recursive)
    return decorator


def layout_of(latents: Any) -> Layout:
    """Return the layout of a model's first argument; of Z-Image's list, one tensor an image, as if it were stacked."""
    if isinstance(latents, Tensor):
        return tuple(latents.shape), latents.dtype, latents.device
    shape, dtype, device = layout_of(latents[0])
    return (len(latents), *shape), dtype, device


def version_of(value: Any) -> int | None:
    """Return how often a tensor was written to; None of other things, and of tensors that do not count it."""
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def read_output(output: Any) -> Tensor | None:
    """Return the tensor of a model's output, None where `output_tail` cannot make such an output."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    if type(output) is Transformer2DModelOutput:
        output = output.to_tuple()
    single = isinstance(output, tuple) and len(output) == 1 and isinstance(output[0], Tensor)
    return output[0] if single else None


def only_tensor(output: Any) -> Tensor | None:
    """Return what a model's output (or first argument) holds as one tensor, None where that cannot be.

    A list holds one tensor an image, as Z-Image's does: they are stacked.
    """
    if isinstance(output, dict | tuple):
        values = list(output.values()) if isinstance(output, dict) else list(output)
        return only_tensor(values[0]) if len(values) == 1 else None
    if isinstance(output, list):
        alike = output and all(isinstance(each, Tensor) and each.shape == output[0].shape for each in output)
        return torch.stack(output) if alike else None
    return output if isinstance(output, Tensor) else None


def refilled(output: Any, tensor: Tensor) -> Any:
    """Return an output like one of which `only_tensor` found the tensor, with another tensor in it."""
    if isinstance(output, dict):
        return type(output)(**{name: refilled(value, tensor) for name, value in output.items()})
    if isinstance(output, tuple):
        return tuple(refilled(value, tensor) for value in output)
    return list(tensor) if isinstance(output, list) else tensor


def are_equal_halves(latents: Any) -> bool:
    """Whether a model's first argument holds the same latents twice; waits for the device."""
    tensor = only_tensor(latents)
    return tensor is not None and is_doubled(tensor)


@uncompiled()
def agree(output: Any, other_output: Any) -> bool:
    """Whether outputs are the same but for the order of their sums."""
    some, others = list(_tensors(output)), list(_tensors(other_output))
    if [one.shape for one in some] != [other.shape for other in others]:
        return False
    return all(
        torch.allclose(
            one.float(), other.float(), rtol=0, atol=_TAIL_TOLERANCE * float(other.abs().max()), equal_nan=True
        )
        for one, other in zip(some, others, strict=True)
        if other.numel()
    )


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of a model's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | tuple | list):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)

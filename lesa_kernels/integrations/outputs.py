"""What models take and return, whatever holds it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.integrations.runs import uncompiled

# The tail of a compiled model is fused in another way than the same tail behind its blocks.
_TAIL_TOLERANCE = 1e-2


@uncompiled()
def stand_in(latents: Any) -> Tensor:
    """Return a tensor with the layout of a model's first argument; Z-Image takes a list with one tensor an image."""
    if isinstance(latents, Tensor):
        return latents
    first = stand_in(latents[0])
    return first.expand(len(latents), *first.shape)


def tensors(output: Any) -> Iterator[Tensor]:
    """Return the tensors of a model's output, whatever holds them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | tuple | list):
        for value in output.values() if isinstance(output, dict) else output:
            yield from tensors(value)


def only_tensor(output: Any) -> Tensor | None:
    """Return what a model's output (or first argument) holds as one tensor, None where that cannot be.

    Args:
        output: of a model; a list holds one tensor an image, as Z-Image's does.

    Returns:
        The tensor, or the list's, stacked.
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


@uncompiled()
def copied(output: Any) -> Any:
    """Return a copy that shares no memory with an output."""
    return copy.deepcopy(output)


@uncompiled()
def agree(output: Any, other_output: Any) -> bool:
    """Tell whether outputs are the same but for the order of their sums."""
    some, others = list(tensors(output)), list(tensors(other_output))
    if [one.shape for one in some] != [other.shape for other in others]:
        return False
    return all(
        torch.allclose(
            one.float(), other.float(), rtol=0, atol=_TAIL_TOLERANCE * float(other.abs().max()), equal_nan=True
        )
        for one, other in zip(some, others, strict=True)
        if other.numel()
    )

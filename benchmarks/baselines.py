"""What a user would run instead of the kernels. Benchmarks import these and never retype them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lesa_kernels import reference
from lesa_kernels.predictors.kan import KANLinear


def published_eager(history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """LESA as its authors' script writes it: stack the history, mix it by a linear layer, scale, add.

    Args:
        history: K tensors [*feature].
        weight: [K], cast to the features' dtype, in which that script keeps its parameters.
        bias: [1].
        gain: [1].

    Returns:
        [*feature].
    """
    dtype = history[0].dtype
    stacked = torch.stack(list(history), dim=-1)
    mixed = functional.linear(stacked, weight.to(dtype)[None], bias.to(dtype)).squeeze(-1)
    return history[-1] + gain.to(dtype) * mixed


def folded_sum(history: Sequence[Tensor], coefficients: Tensor, offset: Tensor) -> Tensor:
    """One row of a plan in plain torch, summed in float32: what `torch.compile` fuses into one loop.

    Args:
        history: K tensors [*feature].
        coefficients: [K], float32.
        offset: [], float32.

    Returns:
        [*feature].
    """
    total = history[0].float() * coefficients[0]
    for k in range(1, len(history)):
        total = total + history[k].float() * coefficients[k]
    return (total + offset).to(history[0].dtype)


def folded_rows(history: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> list[Tensor]:
    """M rows of a plan, each as `folded_sum`.

    Args:
        history: K tensors [*feature].
        coefficients: [M, K], float32.
        offsets: [M], float32.

    Returns:
        M tensors [*feature].
    """
    return [folded_sum(history, coefficients[m], offsets[m]) for m in range(coefficients.shape[0])]


def published_l1(history: Sequence[Tensor], target: Tensor, weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """The loss of one published training step, from which autograd goes back.

    Args:
        history: K tensors [*feature].
        target: [*feature].
        weight: [K], requires gradients.
        bias: [1], likewise.
        gain: [1], likewise.

    Returns:
        [], the features' dtype.
    """
    return functional.l1_loss(published_eager(history, weight, bias, gain), target)


def kan_eager(x: Tensor, layers: Sequence[KANLinear]) -> Tensor:
    """KAN layers in a row in plain torch, all bases evaluated, differentiated by autograd.

    Args:
        x: [rows, I].
        layers: the layers, of which only the parameters are used.

    Returns:
        [rows, O].
    """
    for layer in layers:
        x = reference.kan_linear(x, layer.grid, layer.base_weight, layer.spline_weight, layer.spline_scaler)
    return x

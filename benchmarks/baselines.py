"""What a user would run instead of the kernels. Benchmarks import these and never retype them."""

from __future__ import annotations

import math
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


def published_taylor_update(previous: Sequence[Tensor], feature: Tensor, distance: float, order: int) -> list[Tensor]:
    """What TaylorSeer's authors' script does on a full step: a loop over the orders, each a difference of two tensors.

    Args:
        previous: the derivatives of the full step before, [*feature] each, of order 0 on.
        feature: [*feature].
        distance: between the two full steps, in steps.
        order: the highest that is kept.

    Returns:
        At most order + 1 derivatives.
    """
    derivatives = [feature]
    for i in range(min(order, len(previous))):
        derivatives.append((derivatives[i] - previous[i]) / distance)
    return derivatives


def published_taylor_forecast(derivatives: Sequence[Tensor], distance: float) -> Tensor:
    """What it does on every other step: the Taylor polynomial, added up term by term.

    Args:
        derivatives: of order 0 on, [*feature] each.
        distance: from the last full step, in steps.

    Returns:
        [*feature].
    """
    output = torch.zeros_like(derivatives[0])
    for i, derivative in enumerate(derivatives):
        output = output + (1 / math.factorial(i)) * derivative * distance**i
    return output


def gram_by_matrix(features: Sequence[Tensor]) -> Tensor:
    """All products at once: the features and ones as rows of a float64 matrix, times its transpose.

    Args:
        features: K tensors [*feature].

    Returns:
        [K + 1, K + 1], float64.
    """
    rows = torch.stack([*features, torch.ones_like(features[0])]).flatten(1).double()
    return rows @ rows.T


def gram_by_dots(features: Sequence[Tensor]) -> Tensor:
    """A dot product for each pair, in float32 because `torch.dot` keeps its sum in the dtype of its inputs.

    Args:
        features: K tensors [*feature].

    Returns:
        [K + 1, K + 1], float64.
    """
    rows = [feature.float().flatten() for feature in [*features, torch.ones_like(features[0])]]
    sums = rows[0].new_empty((len(rows), len(rows)), dtype=torch.float64)
    for i, row in enumerate(rows):
        for j in range(i + 1):
            sums[i, j] = sums[j, i] = torch.dot(row, rows[j])
    return sums


def kan_eager(x: Tensor, layers: Sequence[KANLinear]) -> Tensor:
    """KAN layers in a row in plain torch, differentiated by autograd: efficient-kan's formulation.

    All bases of all inputs are evaluated by whole-tensor steps of the recursion and enter one matrix product.

    Args:
        x: [rows, I].
        layers: the layers, of which only the parameters are used.

    Returns:
        [rows, O].
    """
    for layer in layers:
        x = reference.kan_linear(x, layer.grid, layer.base_weight, layer.spline_weight, layer.spline_scaler)
    return x

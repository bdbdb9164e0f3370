"""Computes what the kernels do as users would without them. Benchmarks import these and never retype them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from lesa_kernels.ops import reference
from lesa_kernels.predictors.kan_network import KANLinear


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


def published_taylor_segment(previous: Sequence[Tensor], feature: Tensor, interval: int, order: int) -> list[Tensor]:
    """A full step of TaylorSeer and every other step until the next one, `interval` steps later.

    Args:
        previous: as in `published_taylor_update`, like the other arguments.
        feature: [*feature].
        interval: between full steps.
        order: the highest that is kept.

    Returns:
        interval - 1 forecasts [*feature].
    """
    derivatives = published_taylor_update(previous, feature, interval, order)
    return [published_taylor_forecast(derivatives, distance) for distance in range(1, interval)]


def chebyshev_features(positions: Tensor, order: int) -> Tensor:
    """Chebyshev polynomials T_0 to T_order: T_0 = 1, T_1 = x, T_i = 2 x T_(i-1) - T_(i-2).

    Args:
        positions: [K], between -1 and 1.
        order: at least 1.

    Returns:
        [K, order + 1].
    """
    columns = [torch.ones_like(positions), positions]
    while len(columns) <= order:
        columns.append(2 * positions * columns[-1] - columns[-2])
    return torch.stack(columns, dim=-1)


def chebyshev_fit(buffer: Tensor, positions: Tensor, order: int, ridge: float) -> Tensor:
    """What SGLang does on a full step to forecast by Spectrum: ridge regression of all features at once.

    The order of operations and the dtypes are those of `ChebyshevForecaster` in
    python/sglang/multimodal_gen/runtime/cache/spectrum.py of github.com/sgl-project/sglang at 13883d2.

    Args:
        buffer: [K, N], float32, the features of K full steps.
        positions: [K], float32, their places between -1 and 1.
        order: of the polynomials.
        ridge: added to the diagonal.

    Returns:
        [order + 1, N], float32; kept in the features' dtype.
    """
    basis = chebyshev_features(positions, order)
    normal = basis.T @ basis + ridge * torch.eye(order + 1, device=basis.device)
    return torch.cholesky_solve(basis.T @ buffer, torch.linalg.cholesky(normal))


def chebyshev_forecast(fitted: Tensor, position: Tensor, order: int) -> Tensor:
    """What it does on every other step: the polynomials at one place times what was fitted, [N].

    Args:
        fitted: [order + 1, N], the features' dtype.
        position: [], float32.
        order: of the polynomials.
    """
    return (chebyshev_features(position[None], order).to(fitted.dtype) @ fitted)[0]


def folded_backward(
    grad: Tensor, history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor
) -> list[Tensor]:
    """Gradients of the folded sum in plain torch, in float32: what `torch.compile` fuses into loops.

    Args:
        grad: [*feature], the gradient of the forecast.
        history: K tensors [*feature].
        weight: [K], float32.
        bias: [1], float32.
        gain: [1], float32.

    Returns:
        K tensors [*feature], then [K], [1] and [1].
    """
    wide, newest = grad.float(), len(history) - 1
    of_history = [(wide * (gain * weight[k] + float(k == newest))).to(grad.dtype) for k in range(len(history))]
    sums, total = torch.stack([(wide * feature.float()).sum() for feature in history]), wide.sum()
    return [*of_history, gain * sums, gain * total, (weight * sums).sum() + bias * total]


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

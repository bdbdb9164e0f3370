"""The meaning of every op, in plain torch: kernels are checked against these functions, other devices run them.

Letters: K history length, N elements of a feature, M forecasts, S steps. Features are float32, float16, bfloat16 or
float64; sums are kept in float32 (float64 for float64 features) and rounded once, at the end. Formulas: LESA, arXiv
2602.20497.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lesa_kernels import contract


class Tolerance(NamedTuple):
    """How far a kernel may lie from the float64 reference: |got - want| <= absolute + relative * scale."""

    relative: float
    absolute: float


# The scale is the sum of the magnitudes of the terms, so that cancellation is not held against a kernel. One rounding
# of the result costs half a unit in the last place (2^-9 bfloat16, 2^-12 float16); sums of 64 float32 terms cost a few
# 2^-24.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-14, 1e-14),
    torch.float32: Tolerance(4e-6, 1e-6),
    torch.float16: Tolerance(6e-4, 1e-6),
    torch.bfloat16: Tolerance(4.5e-3, 1e-6),
}


def _mix(features: Sequence[Tensor], weights: Tensor, offset: Tensor) -> Tensor:
    """Return sum_k weights[k] * features[k] + offset, summed in order in the dtype of `weights`."""
    total = features[0].to(weights.dtype) * weights[0]
    for k in range(1, len(features)):
        total = total + features[k].to(weights.dtype) * weights[k]
    return total + offset


def _parameters(weight: Tensor, bias: Tensor, gain: Tensor, features: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight [K], bias [] and gain [] in the arithmetic dtype of the features."""
    dtype = contract.arithmetic_dtype(features)
    return weight.detach().to(dtype), bias.detach().to(dtype).reshape(()), gain.detach().to(dtype).reshape(())


def _forecast_one(history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """Return the unrounded forecast."""
    return history[-1].to(weight.dtype) + gain * _mix(history, weight, bias)


def predict(history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """Forecast a feature: history[K-1] + gain * (sum_k weight[k] * history[k] + bias).

    Args:
        history: K tensors [*feature], newest last, any strides.
        weight: [K], float32 or the features' dtype.
        bias: [1], likewise.
        gain: [1], likewise.

    Returns:
        A fresh contiguous tensor [*feature] of the features' dtype.

    Raises:
        ValueError: for a wrong shape, count or device.
        TypeError: for a wrong dtype.
    """
    contract.check_predict("predict", history, weight, bias, gain)
    forecast = _forecast_one(history, *_parameters(weight, bias, gain, history[0].dtype))
    return forecast.to(history[0].dtype).contiguous()


def _parameter_gradients(
    grad: Tensor, history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d/d weight, bias and gain for the gradient of the forecast, from S_k = sum g h_k and S_b = sum g."""
    w, b, scale = _parameters(weight, bias, gain, history[0].dtype)
    sums = torch.stack([(grad * feature.to(grad.dtype)).sum() for feature in history])
    total = grad.sum()
    grad_gain = (w * sums).sum() + b * total
    return (
        (scale * sums).to(weight.dtype),
        (scale * total).to(bias.dtype).reshape(bias.shape),
        grad_gain.to(gain.dtype).reshape(gain.shape),
    )


def predict_backward(
    grad: Tensor, history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor, history_needs_grad: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Gradients of `predict`.

    Args:
        grad: [*feature], the gradient of the forecast, features' dtype.
        history: K tensors [*feature].
        weight: [K].
        bias: [1].
        gain: [1].
        history_needs_grad: whether the gradients of the history are wanted; without, none are written.

    Returns:
        K gradients of the history (an empty list when they are not wanted), then those of weight, bias and gain, each
        in the dtype and shape of what it belongs to.

    Raises:
        ValueError: for a wrong shape, count or device.
        TypeError: for a wrong dtype.
    """
    contract.check_predict("predict_backward", history, weight, bias, gain)
    contract.check_like("predict_backward", "grad", grad, "history[0]", history[0])
    w, _, scale = _parameters(weight, bias, gain, history[0].dtype)
    g = grad.to(w.dtype)
    grad_history: list[Tensor] = []
    if history_needs_grad:
        newest = len(history) - 1
        for k in range(len(history)):
            factor = scale * w[k] + (1.0 if k == newest else 0.0)
            grad_history.append((g * factor).to(grad.dtype).contiguous())
    return (grad_history, *_parameter_gradients(g, history, weight, bias, gain))


def predict_l1(
    history: Sequence[Tensor], target: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean absolute error of the forecast and its gradients in the parameters.

    Loss and sign come from the unrounded forecast; the derivative of |0| is taken as 0.

    Args:
        history: K tensors [*feature], newest last.
        target: [*feature], features' dtype: what the forecast should have been.
        weight: [K].
        bias: [1].
        gain: [1].
        out: [*feature] or None: receives the rounded forecast. It must not share memory with history or target.

    Returns:
        loss [] (float32; float64 for float64 features), then the gradients of weight, bias and gain.

    Raises:
        ValueError: for a wrong shape, count or device, or where `out` overlaps itself or another feature.
        TypeError: for a wrong dtype.
    """
    contract.check_predict("predict_l1", history, weight, bias, gain)
    contract.check_like("predict_l1", "target", target, "history[0]", history[0])
    if out is not None:
        contract.check_like("predict_l1", "out", out, "history[0]", history[0])
        contract.check_distinct_elements("predict_l1", "out", out)
        features = {f"history[{k}]": feature for k, feature in enumerate(history)}
        parameters = {"weight": weight, "bias": bias, "gain": gain}
        contract.check_apart("predict_l1", {"out": out}, {"target": target, **features, **parameters})
    forecast = _forecast_one(history, *_parameters(weight, bias, gain, history[0].dtype))
    error = forecast - target.to(forecast.dtype)
    count = error.numel()
    loss = error.abs().sum() / count if count else error.new_zeros(())
    # Tensor.sign makes 0 of NaN, and a gradient of 0 would hide it.
    slopes = torch.where(error.isnan(), error, error.sign())
    grads = _parameter_gradients(slopes / max(count, 1), history, weight, bias, gain)
    if out is not None:
        out.copy_(forecast)
    return (loss, *grads)


def forecast(history: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> list[Tensor]:
    """M forecasts of K features: out[m] = sum_k coefficients[m, k] * history[k] + offsets[m].

    Args:
        history: K tensors [*feature], any strides.
        coefficients: [M, K], float32 or the features' dtype. A coefficient of 0 still multiplies: 0 * NaN is NaN.
        offsets: [M], likewise.

    Returns:
        M fresh contiguous tensors [*feature].

    Raises:
        ValueError: for a wrong shape, count or device.
        TypeError: for a wrong dtype.
    """
    contract.check_history("forecast", history)
    contract.check_rows("forecast", coefficients, offsets, len(history), "history[0]", history[0])
    dtype = contract.arithmetic_dtype(history[0].dtype)
    rows, shifts = coefficients.to(dtype), offsets.to(dtype)
    return [_mix(history, rows[m], shifts[m]).to(history[0].dtype).contiguous() for m in range(rows.shape[0])]


def forecast_into(
    ring: Tensor, coefficients: Tensor, offsets: Tensor, read: Sequence[int], write: Sequence[int]
) -> None:
    """M forecasts of K slots of a ring, written into M slots of it; every read of an element precedes its writes.

    Args:
        ring: [slots, *feature], any strides; its slots must not overlap in memory. Written in place.
        coefficients: [M, K], float32 or the ring's dtype.
        offsets: [M], likewise.
        read: K slots, repeats allowed.
        write: M distinct slots; they may be among those read.

    Raises:
        ValueError: for a wrong shape, count, slot or device.
        TypeError: for a wrong dtype.
    """
    contract.check_forecast_into(ring, coefficients, offsets, read, write)
    contract.check_distinct_elements("forecast_into", "ring", ring)
    contract.check_apart("forecast_into", {"ring": ring}, {"coefficients": coefficients, "offsets": offsets})
    rows = forecast([ring[slot] for slot in read], coefficients, offsets)
    for slot, row in zip(write, rows, strict=True):
        ring[slot].copy_(row)


def push(ring: Tensor, feature: Tensor, slot: int) -> None:
    """Copy a feature into a slot of a ring, converting its dtype as `Tensor.copy_` does.

    Args:
        ring: [slots, *feature], written in place.
        feature: [*feature], any feature dtype, any strides; it may be the slot, but not overlap it in part.
        slot: which slot.

    Raises:
        ValueError: for a wrong shape, slot or device.
        TypeError: for a dtype that is no feature dtype.
    """
    contract.check_push(ring, feature, slot)
    contract.check_distinct_elements("push", "ring", ring)
    contract.check_copy("push", "feature", ring[slot], feature)
    ring[slot].copy_(feature)


def gram(features: Sequence[Tensor]) -> Tensor:
    """Sums of the products of all pairs of K features and the constant 1: what a least-squares fit needs of them.

    Args:
        features: K tensors [*feature], any strides, not differentiated.

    Returns:
        [K + 1, K + 1], float64, symmetric: entry (i, j) is the sum over the elements of h_i * h_j, where h_K = 1.

    Raises:
        ValueError: for a wrong shape, count or device.
        TypeError: for a wrong dtype.
    """
    contract.check_features("gram", "features", features)
    sums = features[0].new_empty((len(features) + 1, len(features) + 1), dtype=torch.float64)
    for i, feature in enumerate(features):
        wide = feature.detach().double()
        for j in range(i + 1):
            sums[i, j] = sums[j, i] = (wide * features[j].detach()).sum()
        sums[i, -1] = sums[-1, i] = wide.sum()
    sums[-1, -1] = features[0].numel()
    return sums


def identity(feature: Tensor) -> Tensor:
    """Copy a feature: the smallest op, kept as the template of a new one.

    Args:
        feature: [*feature], any strides.

    Returns:
        A fresh row-major tensor of the same shape, dtype and values.

    Raises:
        TypeError: for a wrong dtype.
    """
    contract.check_feature("identity", "feature", feature)
    return feature.detach().clone(memory_format=torch.contiguous_format)


def spline_order(grid: Tensor, spline_weight: Tensor) -> int:
    """Return the order of the B-splines of a KAN layer (3 is cubic): knots = bases + order + 1.

    Args:
        grid: [in, knots].
        spline_weight: [out, in, bases].
    """
    return grid.shape[1] - spline_weight.shape[2] - 1


def spline_bases(x: Tensor, grid: Tensor, order: int) -> Tensor:
    """B-spline bases by the Cox-de Boor recursion on half-open intervals; the grid may be non-uniform.

    Args:
        x: [..., I].
        grid: [I, G], ascending knots of each input.
        order: polynomial order, 3 is cubic.

    Returns:
        [..., I, G - 1 - order]; zero outside the knots.
    """
    x = x.unsqueeze(-1)
    bases = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
    for degree in range(1, order + 1):
        rising = (x - grid[:, : -degree - 1]) / (grid[:, degree:-1] - grid[:, : -degree - 1])
        falling = (grid[:, degree + 1 :] - x) / (grid[:, degree + 1 :] - grid[:, 1:-degree])
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    return bases


def spline_slopes(x: Tensor, grid: Tensor, order: int) -> Tensor:
    """Derivative of `spline_bases` in x: the difference of two bases of one order less.

    Args:
        x: [..., I].
        grid: [I, G].
        order: polynomial order of the bases.

    Returns:
        [..., I, G - 1 - order].
    """
    if order == 0:
        return torch.zeros_like(spline_bases(x, grid, 0))
    lower = spline_bases(x, grid, order - 1)
    scaled = lower * (order / (grid[:, order:] - grid[:, :-order]))
    return scaled[..., :-1] - scaled[..., 1:]


def kan_linear(x: Tensor, grid: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor) -> Tensor:
    """One KAN layer: base_weight @ silu(x) + (spline_weight * spline_scaler) @ B(x), B the B-spline bases.

    Args:
        x: [..., I].
        grid: [I, B + order + 1], ascending knots, not differentiated.
        base_weight: [O, I], float32 or x's dtype.
        spline_weight: [O, I, B], likewise.
        spline_scaler: [O, I], likewise.

    Returns:
        [..., O] of x's dtype, contiguous.

    Raises:
        ValueError: for a wrong shape or device.
        TypeError: for a wrong dtype.
    """
    contract.check_kan_linear("kan_linear", x, grid, base_weight, spline_weight, spline_scaler)
    dtype = contract.arithmetic_dtype(x.dtype)
    wide, knots = x.to(dtype), grid.to(dtype)
    bases = spline_bases(wide, knots, spline_order(grid, spline_weight))
    splines = spline_weight.to(dtype) * spline_scaler.to(dtype).unsqueeze(-1)
    # The products would enter the dispatcher again and be cast to the autocast dtype.
    with torch.autocast(x.device.type, enabled=False):
        smooth = functional.linear(functional.silu(wide), base_weight.to(dtype))
        return (smooth + functional.linear(bases.flatten(-2), splines.flatten(1))).to(x.dtype).contiguous()


def kan_linear_backward(
    grad: Tensor, x: Tensor, grid: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `kan_linear` in x, base_weight, spline_weight and spline_scaler.

    Args:
        grad: [..., O], x's dtype.
        x: [..., I].
        grid: [I, B + order + 1].
        base_weight: [O, I].
        spline_weight: [O, I, B].
        spline_scaler: [O, I].

    Returns:
        The four gradients, each in the dtype and shape of what it belongs to.

    Raises:
        ValueError: for a wrong shape or device.
        TypeError: for a wrong dtype.
    """
    op = "kan_linear_backward"
    contract.check_kan_linear(op, x, grid, base_weight, spline_weight, spline_scaler)
    contract.check_gradient(op, grad, (*x.shape[:-1], base_weight.shape[0]), "x", x)
    dtype = contract.arithmetic_dtype(x.dtype)
    rows, knots, order = x.shape[:-1].numel(), grid.to(dtype), spline_order(grid, spline_weight)
    wide, g = x.to(dtype).reshape(rows, x.shape[-1]), grad.to(dtype).reshape(rows, base_weight.shape[0])
    base, spline, scaler = (parameter.to(dtype) for parameter in (base_weight, spline_weight, spline_scaler))
    sigmoid = torch.sigmoid(wide)
    silu_slope = sigmoid * (1 + wide * (1 - sigmoid))
    with torch.autocast(x.device.type, enabled=False):
        through_splines = torch.einsum("no,oib->nib", g, spline * scaler.unsqueeze(-1))
        grad_x = (g @ base) * silu_slope + (through_splines * spline_slopes(wide, knots, order)).sum(-1)
        grad_base = g.T @ (wide * sigmoid)
        grad_scaled = torch.einsum("no,nib->oib", g, spline_bases(wide, knots, order))
    return (
        grad_x.reshape(x.shape).to(x.dtype),
        grad_base.to(base_weight.dtype),
        (grad_scaled * scaler.unsqueeze(-1)).to(spline_weight.dtype),
        (grad_scaled * spline).sum(-1).to(spline_scaler.dtype),
    )

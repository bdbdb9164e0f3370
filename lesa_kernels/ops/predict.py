"""`predict`, its backward and `predict_l1`: LESA's forecast (arXiv 2602.20497), its gradients, its loss in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.ops.contract import (
    check_apart,
    check_distinct_elements,
    check_features,
    check_like,
    check_parameter,
    numbered,
)
from lesa_kernels.ops.numerics import arithmetic_dtype, weighted_sum
from lesa_kernels.ops.register import (
    OPS,
    MakeTensor,
    Op,
    declare,
    fresh_like,
    is_transformed,
    refuse_second_derivative,
    save_arguments,
)


def _parameters(weight: Tensor, bias: Tensor, gain: Tensor, features: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight [K], bias [] and gain [] in the arithmetic dtype of the features."""
    dtype = arithmetic_dtype(features)
    return weight.to(dtype), bias.to(dtype).reshape(()), gain.to(dtype).reshape(())


def _forecast_one(history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """Return the unrounded forecast."""
    return history[-1].to(weight.dtype) + gain * weighted_sum(history, weight, bias)


def predict(history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """Forecast a feature: history[K-1] + gain * (sum_k weight[k] * history[k] + bias).

    Args:
        history: K tensors [*feature], newest last, any strides.
        weight: [K], float32 or the features' dtype.
        bias: [1], likewise.
        gain: [1], likewise.

    Returns:
        A fresh contiguous tensor [*feature] of the features' dtype.
    """
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
    """
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
    """
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


def check_predict(op: str, history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> None:
    """Check the arguments of `predict`, which its relatives share.

    Args:
        op: str, the name for messages.
        history: K tensors [*feature].
        weight: [K].
        bias: one element, any shape.
        gain: one element, any shape.

    Raises:
        ValueError: for a wrong shape, count or device.
        TypeError: for a wrong dtype.
    """
    check_features(op, "history", history)
    check_parameter(op, "weight", weight, (len(history),), "history[0]", history[0])
    check_parameter(op, "bias", bias, None, "history[0]", history[0])
    check_parameter(op, "gain", gain, None, "history[0]", history[0])


def _check_backward(
    op: str, grad: Tensor, history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor, needs_grad: bool
) -> None:
    """Check the arguments of `predict_backward`."""
    check_predict(op, history, weight, bias, gain)
    check_like(op, "grad", grad, "history[0]", history[0])


def _check_l1(
    op: str, history: Sequence[Tensor], target: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, out: Tensor | None
) -> None:
    """Check the arguments of `predict_l1`: nothing overlaps `out`."""
    check_predict(op, history, weight, bias, gain)
    check_like(op, "target", target, "history[0]", history[0])
    if out is not None:
        check_like(op, "out", out, "history[0]", history[0])
        check_distinct_elements(op, "out", out)
        read = {"target": target, "weight": weight, "bias": bias, "gain": gain, **numbered("history", history)}
        check_apart(op, "out", out, read)


def _fake(history: Sequence[Tensor], *parameters: Tensor) -> Tensor:
    """Return a forecast."""
    return fresh_like(history[0])


def _fake_backward(
    grad: Tensor, history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor, history_needs_grad: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Return the gradients."""
    grad_history = list(map(fresh_like, history)) if history_needs_grad else []
    return grad_history, fresh_like(weight), fresh_like(bias), fresh_like(gain)


def _fake_l1(
    history: Sequence[Tensor], target: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and the gradients."""
    loss = target.new_empty((), dtype=arithmetic_dtype(target.dtype))
    return loss, fresh_like(weight), fresh_like(bias), fresh_like(gain)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Return the gradients; those of the history only where one of them is needed."""
    *history, weight, bias, gain = ctx.saved_tensors
    wanted = any(ctx.needs_input_grad[0])
    grad_history, *grad_parameters = torch.ops.lesa.predict_backward(grad, history, weight, bias, gain, wanted)
    return grad_history if wanted else [None] * len(history), *grad_parameters


def _example(tensor: MakeTensor, shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Make valid arguments."""
    return [tensor(*shape) for _ in range(4)], tensor(4), tensor(1), tensor()


def _example_backward(tensor: MakeTensor, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Make valid arguments."""
    return tensor(*shape), *_example(tensor, shape), True


def _example_l1(tensor: MakeTensor, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """Make valid arguments."""
    history, *parameters = _example(tensor, shape)
    return history, tensor(*shape), *parameters, tensor(*shape)


declare(
    Op(
        "predict(Tensor[] history, Tensor weight, Tensor bias, Tensor gain) -> Tensor",
        predict,
        check_predict,
        _example,
        _fake,
        _backward,
        save_arguments,
    )
)
declare(
    Op(
        "predict_backward(Tensor grad, Tensor[] history, Tensor weight, Tensor bias, Tensor gain,"
        " bool history_needs_grad) -> (Tensor[], Tensor, Tensor, Tensor)",
        predict_backward,
        _check_backward,
        _example_backward,
        _fake_backward,
        refuse_second_derivative,
    )
)
declare(
    Op(
        "predict_l1(Tensor[] history, Tensor target, Tensor weight, Tensor bias, Tensor gain, Tensor(a!)? out)"
        " -> (Tensor loss, Tensor grad_weight, Tensor grad_bias, Tensor grad_gain)",
        predict_l1,
        _check_l1,
        _example_l1,
        _fake_l1,
    )
)


class _PredictL1(torch.autograd.Function):
    """Feeds the gradients that `predict_l1` computed along with the loss into autograd."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, gain: Tensor, target: Tensor, out: Tensor | None, *history: Tensor
    ) -> Tensor:
        loss: Tensor
        loss, *gradients = torch.ops.lesa.predict_l1(list(history), target, weight, bias, gain, out)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, bias, gain = ctx.saved_tensors
        scaled = tuple((grads[0] * gradient).to(gradient.dtype) for gradient in (weight, bias, gain))
        return (*scaled, *([None] * (len(ctx.needs_input_grad) - 3)))


def predict_l1_loss(
    history: Sequence[Tensor], target: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, out: Tensor | None = None
) -> Tensor:
    """Mean absolute error of `predict`, differentiable in weight, bias and gain; one pass over the features.

    Args:
        history: K tensors [*feature], newest last; treated as constants.
        target: [*feature], a constant too.
        weight: [K].
        bias: [1].
        gain: [1].
        out: [*feature] or None: receives the forecast, detached (closed-loop training feeds it back).

    Returns:
        The loss [], float32 (float64 for float64 features).

    Raises:
        RuntimeError: for a wrong argument, as the op does, and where the history or target requires gradients.
    """
    for name, tensor in {**numbered("history", history), "target": target}.items():
        if tensor.requires_grad:
            raise RuntimeError(
                f"predict_l1_loss: {name} must not require gradients, detach it: it is taken as a constant"
            )
    loss: Tensor
    if is_transformed(history, target, weight, bias, gain):
        loss, *_ = OPS["predict_l1"].checked(predict_l1)(list(history), target, weight, bias, gain, out)
        return loss
    loss = _PredictL1.apply(  # type: ignore[no-untyped-call]
        weight, bias, gain, target, out, *history
    )
    return loss

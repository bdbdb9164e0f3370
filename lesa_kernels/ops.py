"""The ops `torch.ops.lesa.*`: schema, reference registration, fakes and autograd, each declared once.

Compiled kernels take the CPU and CUDA keys of the dispatcher when `lesa_kernels.backends` loads them; every other
device runs the reference. What each op means stands in `lesa_kernels.reference`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from lesa_kernels import contract, reference

_Function = TypeVar("_Function", bound=Callable[..., Any])

_SCHEMAS = {
    "predict": "(Tensor[] history, Tensor weight, Tensor bias, Tensor gain) -> Tensor",
    "predict_backward": "(Tensor grad, Tensor[] history, Tensor weight, Tensor bias, Tensor gain,"
    " bool history_needs_grad) -> (Tensor[], Tensor, Tensor, Tensor)",
    "predict_l1": "(Tensor[] history, Tensor target, Tensor weight, Tensor bias, Tensor gain, Tensor(a!)? out)"
    " -> (Tensor loss, Tensor grad_weight, Tensor grad_bias, Tensor grad_gain)",
    "forecast": "(Tensor[] history, Tensor coefficients, Tensor offsets) -> Tensor[]",
    "forecast_into": "(Tensor(a!) ring, Tensor coefficients, Tensor offsets, int[] read, int[] write) -> ()",
    "push": "(Tensor(a!) ring, Tensor feature, int slot) -> ()",
    "gram": "(Tensor[] features) -> Tensor",
    "identity": "(Tensor feature) -> Tensor",
    "kan_linear": "(Tensor x, Tensor grid, Tensor base_weight, Tensor spline_weight, Tensor spline_scaler) -> Tensor",
    "kan_linear_backward": "(Tensor grad, Tensor x, Tensor grid, Tensor base_weight, Tensor spline_weight,"
    " Tensor spline_scaler) -> (Tensor, Tensor, Tensor, Tensor)",
}
OPS = tuple(_SCHEMAS)

_library = torch.library.Library("lesa", "DEF")


def _of_plain(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """Let a Python implementation see tensors that are there and dense, as the kernels do."""
    arguments = getattr(torch.ops.lesa, name).default._schema.arguments
    optional = {argument.name for argument in arguments if "Optional" in str(argument.type)}

    @wraps(compute)
    def checked(*values: Any) -> Any:
        named = dict(zip((argument.name for argument in arguments), values, strict=True))
        contract.check_plain(
            name, {key: each for key, each in named.items() if key not in optional or each is not None}
        )
        return compute(*values)

    return checked


for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _of_plain(_name, getattr(reference, _name)), "CompositeExplicitAutograd")


def _fake(name: str) -> Callable[[_Function], _Function]:
    def register(function: _Function) -> _Function:
        torch.library.register_fake(f"lesa::{name}", _of_plain(name, function), lib=_library)
        return function

    return register


def _fresh(like: Tensor) -> Tensor:
    return like.new_empty(like.shape)


@_fake("predict")
def _predict_fake(history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    contract.check_predict("predict", history, weight, bias, gain)
    return _fresh(history[0])


@_fake("predict_backward")
def _predict_backward_fake(
    grad: Tensor, history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor, history_needs_grad: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    contract.check_predict("predict_backward", history, weight, bias, gain)
    contract.check_like("predict_backward", "grad", grad, "history[0]", history[0])
    grad_history = [_fresh(feature) for feature in history] if history_needs_grad else []
    return grad_history, _fresh(weight), _fresh(bias), _fresh(gain)


@_fake("predict_l1")
def _predict_l1_fake(
    history: Sequence[Tensor], target: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    contract.check_predict("predict_l1", history, weight, bias, gain)
    contract.check_like("predict_l1", "target", target, "history[0]", history[0])
    if out is not None:
        contract.check_like("predict_l1", "out", out, "history[0]", history[0])
    loss = history[0].new_empty((), dtype=contract.arithmetic_dtype(history[0].dtype))
    return loss, _fresh(weight), _fresh(bias), _fresh(gain)


@_fake("forecast")
def _forecast_fake(history: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> list[Tensor]:
    contract.check_history("forecast", history)
    contract.check_rows("forecast", coefficients, offsets, len(history), "history[0]", history[0])
    return [_fresh(history[0]) for _ in range(coefficients.shape[0])]


@_fake("forecast_into")
def _forecast_into_fake(
    ring: Tensor, coefficients: Tensor, offsets: Tensor, read: Sequence[int], write: Sequence[int]
) -> None:
    contract.check_forecast_into(ring, coefficients, offsets, read, write)


@_fake("push")
def _push_fake(ring: Tensor, feature: Tensor, slot: int) -> None:
    contract.check_push(ring, feature, slot)


@_fake("gram")
def _gram_fake(features: Sequence[Tensor]) -> Tensor:
    contract.check_features("gram", "features", features)
    return features[0].new_empty((len(features) + 1, len(features) + 1), dtype=torch.float64)


@_fake("identity")
def _identity_fake(feature: Tensor) -> Tensor:
    contract.check_feature("identity", "feature", feature)
    return _fresh(feature)


@_fake("kan_linear")
def _kan_linear_fake(
    x: Tensor, grid: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor
) -> Tensor:
    contract.check_kan_linear("kan_linear", x, grid, base_weight, spline_weight, spline_scaler)
    return x.new_empty((*x.shape[:-1], base_weight.shape[0]))


@_fake("kan_linear_backward")
def _kan_linear_backward_fake(
    grad: Tensor, x: Tensor, grid: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "kan_linear_backward"
    contract.check_kan_linear(op, x, grid, base_weight, spline_weight, spline_scaler)
    contract.check_gradient(op, grad, (*x.shape[:-1], base_weight.shape[0]), "x", x)
    return _fresh(x), _fresh(base_weight), _fresh(spline_weight), _fresh(spline_scaler)


def _predict_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    history, weight, bias, gain = inputs
    ctx.save_for_backward(*history, weight, bias, gain)


def _predict_autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    *history, weight, bias, gain = ctx.saved_tensors
    wanted = ctx.needs_input_grad[0]
    grad_history, grad_weight, grad_bias, grad_gain = torch.ops.lesa.predict_backward(
        grad, history, weight, bias, gain, any(wanted)
    )
    return grad_history if any(wanted) else [None] * len(history), grad_weight, grad_bias, grad_gain


def _forecast_setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    history, coefficients, offsets = inputs
    ctx.save_for_backward(*history, coefficients, offsets)


def _forecast_autograd(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """The transpose of a linear map: the history's gradients are a forecast of the outputs' gradients."""
    *history, coefficients, offsets = ctx.saved_tensors
    history_wanted, coefficients_wanted, offsets_wanted = ctx.needs_input_grad
    filled = [torch.zeros_like(history[0]) if grad is None else grad for grad in grads]
    grad_history: list[Tensor | None] = [None] * len(history)
    if any(history_wanted):
        zeros = coefficients.new_zeros(len(history))
        grad_history = torch.ops.lesa.forecast(filled, coefficients.t().contiguous(), zeros)
    dtype = contract.arithmetic_dtype(history[0].dtype)
    wide = [grad.to(dtype) for grad in filled] if coefficients_wanted or offsets_wanted else []
    grad_coefficients = grad_offsets = None
    if coefficients_wanted:
        products = [torch.stack([(g * feature.to(dtype)).sum() for feature in history]) for g in wide]
        grad_coefficients = torch.stack(products).to(coefficients.dtype)
    if offsets_wanted:
        grad_offsets = torch.stack([g.sum() for g in wide]).to(offsets.dtype)
    return grad_history, grad_coefficients, grad_offsets


def _kan_linear_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _kan_linear_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, grad_base, grad_spline, grad_scaler = torch.ops.lesa.kan_linear_backward(grad, *ctx.saved_tensors)
    return grad_x, None, grad_base, grad_spline, grad_scaler


torch.library.register_autograd("lesa::predict", _predict_autograd, setup_context=_predict_setup, lib=_library)
torch.library.register_autograd("lesa::forecast", _forecast_autograd, setup_context=_forecast_setup, lib=_library)
torch.library.register_autograd("lesa::kan_linear", _kan_linear_autograd, setup_context=_kan_linear_setup, lib=_library)


def _once_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Nothing is saved: the gradients of gradients are refused."""


def _refuse_twice(ctx: Any, *grads: Any) -> None:
    raise RuntimeError("lesa: predict and kan_linear are differentiable once, got a gradient of their gradients")


for _name in ("predict_backward", "kan_linear_backward"):
    torch.library.register_autograd(f"lesa::{_name}", _refuse_twice, setup_context=_once_setup, lib=_library)


def _not_differentiable(name: str, written: Sequence[int] = ()) -> None:
    """Refuse gradients, which would be lost, and let autograd see what an op writes to.

    Args:
        name: of the op.
        written: positions of the arguments that it writes to; a backward that saved their old values then refuses.
    """
    overload = getattr(torch.ops.lesa, name).default
    names = [argument.name for argument in overload._schema.arguments]

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for argument, value in zip(names, arguments, strict=False):
                tensors = value if isinstance(value, list | tuple) else [value]
                if any(isinstance(each, Tensor) and each.requires_grad for each in tensors):
                    raise RuntimeError(
                        f"lesa::{name}: {argument} must not require gradients, the op has none; detach it, or call the "
                        "op under torch.no_grad()"
                    )
        for position in written:
            if arguments[position] is None:
                continue
            if arguments[position].is_neg():
                raise RuntimeError(
                    f"lesa::{name}: {names[position]} must hold what is written as it is, got a view with the negative "
                    "bit; resolve_neg() makes a tensor without"
                )
            torch.autograd.graph.increment_version(arguments[position])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    # Inference mode leaves the first key out, and the second one in for tensors from outside of it.
    for key in ("Autograd", "ADInplaceOrView") if written else ("Autograd",):
        _library.impl(name, kernel, key, with_keyset=True)


for _name, _written in (
    ("forecast_into", [0]),
    ("push", [0]),
    ("predict_l1", [5]),
    ("gram", []),
    ("identity", []),
):
    _not_differentiable(_name, _written)


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
        bias: one element.
        gain: one element.
        out: [*feature] or None: receives the forecast, detached (closed-loop training feeds it back).

    Returns:
        The loss [], float32 (float64 for float64 features).

    Raises:
        ValueError: for a wrong shape, count or device, or where the history or target requires gradients.
        TypeError: for a wrong dtype.
    """
    for name, tensor in [*((f"history[{k}]", feature) for k, feature in enumerate(history)), ("target", target)]:
        if tensor.requires_grad:
            raise ValueError(
                f"predict_l1_loss: {name} must not require gradients, detach it: it is taken as a constant"
            )
    loss: Tensor = _PredictL1.apply(  # type: ignore[no-untyped-call]
        weight, bias, gain, target, out, *history
    )
    return loss

"""Autograd, fakes and torch.compile of every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lesa_kernels.ops import OPS, predict_l1_loss

ops = torch.ops.lesa


def _finest() -> torch.dtype:
    """The widest dtype of features on the test's device."""
    return torch.float64 if torch.get_default_device().type == "cpu" else torch.float32


def _random(*shape: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=dtype or _finest(), requires_grad=grad)


def _kan(dtype: torch.dtype | None = None, grad: bool = True) -> tuple[Tensor, ...]:
    dtype = dtype or _finest()
    grid = (torch.arange(-3, 9) * 1.2 - 3).to(dtype).expand(3, 12).contiguous()
    # Kept off the knots: bases of low order have kinks there.
    x = (torch.rand(4, 3, dtype=dtype) * 8 - 4).requires_grad_(grad)
    return (x, grid, *(_random(*shape, dtype=dtype, grad=grad) for shape in [(2, 3), (2, 3, 8), (2, 3)]))


def _arguments(dtype: torch.dtype, grad: bool) -> dict[str, tuple[Any, ...]]:
    """One set of valid arguments for each op."""

    def random(*shape: int) -> Tensor:
        return _random(*shape, dtype=dtype, grad=grad)

    def constant(*shape: int) -> Tensor:
        return _random(*shape, dtype=dtype, grad=False)

    history = [random(3, 5) for _ in range(4)]
    flat = [constant(3, 5) for _ in range(4)]
    return {
        "predict": (history, random(4), random(1), random()),
        "predict_backward": (constant(3, 5), flat, constant(4), constant(1), constant(), True),
        "predict_l1": (flat, constant(3, 5), constant(4), constant(1), constant(1), constant(3, 5)),
        "forecast": (history, random(3, 4), random(3)),
        "forecast_into": (constant(5, 3, 4), constant(2, 3), constant(2), [0, 1, 2], [2, 4]),
        "push": (constant(5, 3, 4), constant(3, 4), 2),
        "gram": (flat,),
        "identity": (constant(3, 5),),
        "kan_linear": _kan(dtype, grad),
        "kan_linear_backward": (constant(4, 2), *_kan(dtype, False)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(ops, op), _arguments(dtype, grad=True)[op])


@pytest.mark.float64
def test_gradcheck_predict() -> None:
    history = [_random(3, 4) for _ in range(3)]
    inputs = (*history, _random(3), _random(1), _random())
    assert torch.autograd.gradcheck(lambda *a: ops.predict(list(a[:3]), *a[3:]), inputs)


@pytest.mark.float64
def test_gradcheck_forecast() -> None:
    inputs = (*[_random(3, 4) for _ in range(3)], _random(2, 3), _random(2))
    assert torch.autograd.gradcheck(lambda *a: tuple(ops.forecast(list(a[:3]), *a[3:])), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: tuple(ops.forecast(list(a[:3]), *a[3:])), inputs)


@pytest.mark.float64
def test_gradcheck_kan_linear() -> None:
    assert torch.autograd.gradcheck(ops.kan_linear, _kan())


@pytest.mark.float64
def test_gradcheck_predict_l1() -> None:
    history, target = [_random(3, 4, grad=False) for _ in range(3)], _random(3, 4, grad=False)
    inputs = (_random(3), _random(1), _random())
    assert torch.autograd.gradcheck(lambda w, b, g: predict_l1_loss(history, target, w, b, g), inputs)


def test_predict_backward_computes_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    history = [_random(3, 4, grad=False) for _ in range(3)]
    weight, bias, gain = _random(3), _random(1), _random(1)
    ops.predict(history, weight, bias, gain).sum().backward()
    assert all(feature.grad is None for feature in history) and weight.grad is not None
    one = [_random(3, 4, grad=k == 1) for k in range(3)]
    ops.predict(one, weight.detach(), bias.detach(), gain.detach()).sum().backward()
    assert one[0].grad is None and one[1].grad is not None


def test_forecast_backward_with_an_unused_output() -> None:
    history, coefficients, offsets = [_random(3, 4) for _ in range(2)], _random(3, 2), _random(3)
    ops.forecast(history, coefficients, offsets)[1].sum().backward()
    assert torch.allclose(history[0].grad, coefficients[1, 0].expand(3, 4))
    assert coefficients.grad is not None and not coefficients.grad[0].any() and offsets.grad.tolist() == [0, 12, 0]


def test_predict_l1_loss_refuses_a_history_that_wants_gradients() -> None:
    with pytest.raises(ValueError, match=r"history\[1\] must not require gradients"):
        predict_l1_loss(
            [torch.randn(3), _random(3).float()], torch.randn(3), torch.ones(2), torch.ones(1), torch.ones(1)
        )


def test_gradients_of_gradients_are_refused() -> None:
    history, weight = [_random(3, 4)], _random(1)
    (grad,) = torch.autograd.grad(ops.predict(history, weight, _random(1), _random(1)).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    x, *rest = _kan()
    (grad,) = torch.autograd.grad(ops.kan_linear(x, *rest).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "op",
    ["predict_l1", "forecast_into", "push", "gram"],
)
def test_ops_without_gradients_refuse_them(op: str) -> None:
    schema = getattr(ops, op).default._schema
    for position, argument in enumerate(schema.arguments):
        arguments = list(_arguments(torch.float32, grad=False)[op])
        value = arguments[position]
        wanting = value[-1] if isinstance(value, list) else value
        if not isinstance(wanting, Tensor) or not wanting.is_floating_point():
            continue
        wanting.requires_grad_()
        before = [each.clone() for each in arguments if isinstance(each, Tensor)]
        with pytest.raises(RuntimeError, match=f"lesa::{op}: {argument.name} must not require gradients"):
            getattr(ops, op)(*arguments)
        assert all(map(torch.equal, [each for each in arguments if isinstance(each, Tensor)], before))
        with torch.no_grad():
            getattr(ops, op)(*arguments)


def test_autograd_sees_what_the_mutating_ops_write() -> None:
    for write in (
        lambda ring: ops.push(ring, torch.ones(2, 4), 0),
        lambda ring: ops.forecast_into(ring, torch.ones(1, 1), torch.zeros(1), [1], [0]),
    ):
        ring, factor = torch.randn(3, 2, 4), torch.randn(4, requires_grad=True)
        product = (ring[0] * factor).sum()
        write(ring)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def _model_step(history: list[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    return ops.predict(history, weight, bias, gain).sin().sum()


def _ring_step(ring: Tensor, feature: Tensor, coefficients: Tensor, offsets: Tensor) -> Tensor:
    ops.push(ring, feature, 1)
    ops.forecast_into(ring, coefficients, offsets, [0, 1], [2, 0])
    return ring[2] * 2


def test_compile_predict_forward_and_backward() -> None:
    def run(step: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        inputs = [_random(3, 5) for _ in range(4)], _random(4), _random(1), _random(1)
        loss = step(*inputs)
        loss.backward()
        return [loss.detach(), *(feature.grad for feature in inputs[0]), *(tensor.grad for tensor in inputs[1:])]

    compiled = torch.compile(_model_step, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), run(_model_step), strict=True):
        torch.testing.assert_close(got, want)


def test_compile_of_the_mutating_ops_with_inductor() -> None:
    def run(step: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        ring = torch.randn(3, 8, 9)
        return step(ring, torch.randn(8, 9), torch.randn(2, 2), torch.randn(2)), ring

    got, want = run(torch.compile(_ring_step, fullgraph=True)), run(_ring_step)
    torch.testing.assert_close(got, want)

"""Gradients on the GPU, eager and compiled, against autograd through the reference in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lesa_kernels.ops import predict_l1_loss, reference
from lesa_kernels.predictors.kan_network import KAN

DEVICE = torch.device("cuda")
ops = torch.ops.lesa


def _predict(ops: Any, *tensors: Tensor) -> Tensor:
    return ops.predict(list(tensors[:3]), *tensors[3:]).sin().sum()


def _forecast(ops: Any, *tensors: Tensor) -> Tensor:
    first, second = ops.forecast(list(tensors[:3]), *tensors[3:])
    return (first.sin() * second).sum()


def _kan_linear(ops: Any, *tensors: Tensor) -> Tensor:
    grid = (1.2 * torch.arange(-3, 9, device=tensors[0].device) - 3).to(tensors[0].dtype).expand(5, 12).contiguous()
    return ops.kan_linear(tensors[0], grid, *tensors[1:]).sin().sum()


CASES: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "predict": (_predict, [(7, 33)] * 3 + [(3,), (1,), ()]),
    "forecast": (_forecast, [(7, 33)] * 3 + [(2, 3), (2,)]),
    "kan_linear": (_kan_linear, [(6, 5), (4, 5), (4, 5, 8), (4, 5)]),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_match_autograd_through_the_reference(name: str, compiled: bool) -> None:
    function, shapes = CASES[name]
    inputs = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]

    def step(*tensors: Tensor) -> Tensor:
        return function(ops, *tensors)

    torch.compiler.reset()
    loss = (torch.compile(step, fullgraph=True) if compiled else step)(*inputs)
    want = _through_reference(name, exact)
    torch.testing.assert_close(loss.double(), want, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(want, exact), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4)


def _through_reference(name: str, exact: list[Tensor]) -> Tensor:
    """The same in float64; predict is written out, because its reference takes the parameters as constants."""
    if name != "predict":
        return CASES[name][0](reference, *exact)
    *history, weight, bias, gain = exact
    mixed = sum(weight[k] * feature for k, feature in enumerate(history))
    return (history[-1] + gain * (mixed + bias)).sin().sum()


def test_a_closed_loop_step_trains_a_whole_predictor() -> None:
    """Network, forecast, loss and every gradient, as in training, against float64 on the CPU."""
    network, history = KAN((6, 16, 1)), [torch.randn(3, 40) for _ in range(4)]
    target, weight, bias, x = torch.randn(3, 40), torch.randn(4), torch.randn(1), torch.randn(6)

    def gradients(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
        placed = KAN((6, 16, 1)).to(device, dtype)
        placed.load_state_dict(network.state_dict())
        moved = [tensor.to(device, dtype) for tensor in (*history, target, weight, bias, x)]
        mixing = [moved[5].requires_grad_(), moved[6].requires_grad_()]
        out = torch.empty_like(moved[4])
        loss = predict_l1_loss(moved[:4], moved[4], *mixing, placed(moved[7]), out)
        return [loss.detach(), out, *torch.autograd.grad(loss, [*mixing, *placed.parameters()])]

    wanted = gradients(torch.device("cpu"), torch.float64)
    for got, want in zip(gradients(DEVICE, torch.float32), wanted, strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-5)

"""What holds for all ops: opcheck, gradients, fakes, torch.compile, threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from op_inputs import kan_layer, make_parameters, random, valid_arguments
from torch import Tensor

from lesa_kernels.ops import OPS, predict_l1_loss

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ops = torch.ops.lesa
ROOT = Path(__file__).resolve().parents[2]
FLOORS = (
    "lesa_kernels/ops/{}.py",
    "lesa_kernels/backends/triton/{}.py",
    "tests/ops/test_{}.py",
    "tests/triton/test_{}.py",
)


@pytest.mark.parametrize("family", sorted({Path(op.reference.__code__.co_filename).stem for op in OPS.values()}))
def test_a_family_of_ops_has_one_name_on_every_floor(family: str) -> None:
    assert [floor for floor in FLOORS if not (ROOT / floor.format(family)).exists()] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(ops, op), valid_arguments(dtype, grad=True)[op])


def test_predict_backward_computes_only_the_gradients_that_are_needed() -> None:
    history = [random(3, 4, grad=False) for _ in range(3)]
    weight, bias, gain = random(3), random(1), random(1)
    ops.predict(history, weight, bias, gain).sum().backward()
    assert all(feature.grad is None for feature in history) and weight.grad is not None
    one = [random(3, 4, grad=k == 1) for k in range(3)]
    ops.predict(one, weight.detach(), bias.detach(), gain.detach()).sum().backward()
    assert one[0].grad is None and one[1].grad is not None


def test_forecast_backward_with_an_unused_output() -> None:
    history, coefficients, offsets = [random(3, 4) for _ in range(2)], random(3, 2), random(3)
    ops.forecast(history, coefficients, offsets)[1].sum().backward()
    assert torch.allclose(history[0].grad, coefficients[1, 0].expand(3, 4))
    assert coefficients.grad is not None and not coefficients.grad[0].any() and offsets.grad.tolist() == [0, 12, 0]


def test_predict_l1_loss_refuses_a_history_that_wants_gradients() -> None:
    with pytest.raises(RuntimeError, match=r"history\[1\] must not require gradients"):
        predict_l1_loss(
            [torch.randn(3), random(3).float()], torch.randn(3), torch.ones(2), torch.ones(1), torch.ones(1)
        )


def test_gradients_of_gradients_are_refused() -> None:
    history, weight = [random(3, 4)], random(1)
    (grad,) = torch.autograd.grad(ops.predict(history, weight, random(1), random(1)).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()
    x, *rest = kan_layer()
    (grad,) = torch.autograd.grad(ops.kan_linear(x, *rest).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.backward is None])
def test_ops_without_gradients_refuse_them(op: str) -> None:
    schema = getattr(ops, op).default._schema
    for position, argument in enumerate(schema.arguments):
        arguments = list(valid_arguments(torch.float32, grad=False)[op])
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
        inputs = [random(3, 5) for _ in range(4)], random(4), random(1), random(1)
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


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    history = [torch.randn(500_001).bfloat16() for _ in range(8)]
    parameters = make_parameters(8, torch.float32)
    threads = torch.get_num_threads()
    kan = (
        torch.rand(40, 51),
        torch.arange(12.0).expand(51, 12) / 6 - 1,
        *map(torch.randn, [(256, 51), (256, 51, 8), (256, 51)]),
    )
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            out = torch.empty_like(history[0])
            sums = [
                ops.gram(history),
                *ops.predict_l1(history[1:], history[0], parameters[0][1:], *parameters[1:], out),
            ]
            layer = [ops.kan_linear(*kan), *ops.kan_linear_backward(torch.ones(40, 256), *kan)]
            results.append([ops.predict(history, *parameters), *sums, out, *layer])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))

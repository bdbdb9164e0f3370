"""A KAN layer in Triton against the definition: grids, orders, sizes, dtypes, points on knots and beyond them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import assert_close, wide
from torch import Tensor

from lesa_kernels.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def _grid(inputs: int, bases: int, order: int, uniform: bool) -> Tensor:
    knots = bases + order + 1
    if uniform:
        return (torch.linspace(-3, 3, knots)).repeat(inputs, 1)
    return (torch.rand(inputs, knots) + 0.2).cumsum(1) - 0.3 * knots


def _layer(
    rows: tuple[int, ...], inputs: int, outputs: int, order: int, bases: int = 8, uniform: bool = False
) -> list[Tensor]:
    weights = [torch.randn(outputs, inputs), torch.randn(outputs, inputs, bases), torch.randn(outputs, inputs)]
    return [2 * torch.randn(*rows, inputs), _grid(inputs, bases, order, uniform), *weights]


def _check(lesa: Any, layer: list[Tensor]) -> None:
    x = layer[0]
    want = reference.kan_linear(*wide(layer))
    got = lesa.kan_linear(*layer)
    assert got.dtype == x.dtype and got.is_contiguous()
    _assert_like_largest(got, want)
    grad = torch.randn(got.shape).to(x.dtype)
    gradients = lesa.kan_linear_backward(grad, *layer)
    for value, wanted, of in zip(
        gradients, reference.kan_linear_backward(grad.double(), *wide(layer)), [x, *layer[2:]], strict=True
    ):
        assert value.dtype == of.dtype and value.shape == of.shape
        _assert_like_largest(value, wanted)


def _assert_like_largest(got: Tensor, want: Tensor) -> None:
    """Terms may be ten times as large as the largest of their sums."""
    scale = 10 * want.abs().max() if want.numel() else want.new_zeros(())
    assert_close(got, want, scale.expand_as(want), got.dtype)


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
def test_orders_and_grids(lesa: Any, order: int, uniform: bool) -> None:
    _check(lesa, _layer((3,), 5, 3, order, uniform=uniform))


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "bases"),
    [((), 1, 1, 8), ((1,), 51, 3, 8), ((2, 3), 2, 5, 1), ((4,), 33, 1, 3), ((2,), 3, 130, 9), ((2,), 130, 2, 33)],
)
def test_sizes(lesa: Any, rows: tuple[int, ...], inputs: int, outputs: int, bases: int) -> None:
    _check(lesa, _layer(rows, inputs, outputs, 3, bases))


@pytest.mark.parametrize("rows", [(0,), (2,)])
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0), (3, 2)])
def test_empty_sizes(lesa: Any, rows: tuple[int, ...], inputs: int, outputs: int) -> None:
    layer = _layer(rows, inputs, outputs, 3)
    _assert_like_largest(lesa.kan_linear(*layer), reference.kan_linear(*wide(layer)))
    gradients = lesa.kan_linear_backward(torch.randn(*rows, outputs), *layer)
    assert [gradient.shape for gradient in gradients] == [layer[at].shape for at in (0, 2, 3, 4)]
    if 0 in (*rows, inputs, outputs):
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_each_argument_has_its_own_dtype_and_strides(lesa: Any, dtype: torch.dtype) -> None:
    x, grid, base, spline, scaler = _layer((6,), 4, 3, 3)
    x, spline = x.to(dtype).t().contiguous().t(), spline.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    _check(lesa, [x, grid, base.to(dtype), spline, scaler])
    _check(lesa, [x, grid, base, spline.float(), scaler.to(dtype).expand(3, 4)])


@pytest.mark.parametrize("order", [0, 3])
def test_points_on_knots_and_at_both_ends(lesa: Any, order: int) -> None:
    layer = _layer((1,), 2, 2, order)
    grid = layer[1]
    beside = [grid, grid.nextafter(grid - 1), grid.nextafter(grid + 1), grid[:, :1] - 1, grid[:, -1:] + 1]
    _check(lesa, [torch.cat(beside, dim=1).t(), *layer[1:]])


@pytest.mark.parametrize("order", [0, 3])
def test_what_is_not_finite_gives_what_the_definition_gives(lesa: Any, order: int) -> None:
    layer = _layer((4,), 3, 2, order)
    layer[0][1, 1], layer[0][2, 0], layer[0][3, 2] = torch.nan, torch.inf, -torch.inf
    got, want = lesa.kan_linear(*layer), reference.kan_linear(*layer)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    gradients = lesa.kan_linear_backward(torch.ones(4, 2), *layer)
    for value, wanted in zip(gradients, reference.kan_linear_backward(torch.ones(4, 2), *layer), strict=True):
        assert torch.equal(value.isnan(), wanted.isnan())


@pytest.mark.exhaustive
@pytest.mark.parametrize(("inputs", "outputs"), [(51, 256), (256, 256), (256, 1)])
def test_the_layers_of_a_predictor(lesa: Any, inputs: int, outputs: int) -> None:
    _check(lesa, _layer((3,), inputs, outputs, 3, uniform=True))

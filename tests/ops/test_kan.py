"""`kan_linear` and its backward, as the dispatcher serves them: grids, orders, sizes, points on and beyond knots."""

from __future__ import annotations

import pytest
import torch
from op_inputs import assert_close, kan_layer, wide
from torch import Tensor

from lesa_kernels.ops import reference
from lesa_kernels.ops.kan import spline_bases

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ops = torch.ops.lesa


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_kan_linear_on_a_non_uniform_grid(order: int) -> None:
    bases, inputs, outputs = 8, 5, 3
    grid = torch.randn(inputs, bases + order + 1).sort(dim=1).values * 2
    x = torch.randn(11, inputs) * 2
    arguments = (
        x,
        grid,
        torch.randn(outputs, inputs),
        torch.randn(outputs, inputs, bases),
        torch.randn(outputs, inputs),
    )
    got = ops.kan_linear(*arguments)
    want = _kan_by_definition(*wide(arguments), order)
    assert_close(got, want, want.abs().max().expand_as(want) * 10, torch.float32)


def _kan_by_definition(x: Tensor, grid: Tensor, base: Tensor, spline: Tensor, scaler: Tensor, order: int) -> Tensor:
    """The layer's formula, element by element, bases by recursion."""

    def basis(t: list[float], i: int, degree: int, at: float) -> float:
        if degree == 0:
            return float(t[i] <= at < t[i + 1])
        left = (at - t[i]) / (t[i + degree] - t[i]) * basis(t, i, degree - 1, at)
        return left + (t[i + degree + 1] - at) / (t[i + degree + 1] - t[i + 1]) * basis(t, i + 1, degree - 1, at)

    out = torch.zeros(x.shape[0], base.shape[0], dtype=torch.float64)
    for n in range(x.shape[0]):
        for i in range(x.shape[1]):
            at, knots = x[n, i].item(), grid[i].tolist()
            values = torch.tensor([basis(knots, b, order, at) for b in range(spline.shape[2])], dtype=torch.float64)
            out[n] += base[:, i] * at * torch.sigmoid(x[n, i]) + (spline[:, i] @ values) * scaler[:, i]
    return out


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


def _check(layer: list[Tensor]) -> None:
    x = layer[0]
    want = reference.kan_linear(*wide(layer))
    got = ops.kan_linear(*layer)
    assert got.dtype == x.dtype and got.is_contiguous()
    _assert_like_largest(got, want)
    grad = torch.randn(got.shape).to(x.dtype)
    gradients = ops.kan_linear_backward(grad, *layer)
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
def test_orders_and_grids(order: int, uniform: bool) -> None:
    _check(_layer((3,), 5, 3, order, uniform=uniform))


@pytest.mark.parametrize(
    ("leading", "inputs", "outputs", "bases"),
    [((), 1, 1, 8), ((1,), 51, 3, 8), ((2, 3), 2, 5, 1), ((4,), 33, 1, 3), ((2,), 3, 130, 9), ((2,), 130, 2, 33)],
)
def test_sizes(leading: tuple[int, ...], inputs: int, outputs: int, bases: int) -> None:
    _check(_layer(leading, inputs, outputs, 3, bases))


@pytest.mark.parametrize("leading", [(0,), (2,)])
@pytest.mark.parametrize(("inputs", "outputs"), [(0, 3), (3, 0), (3, 2)])
def test_empty_sizes(leading: tuple[int, ...], inputs: int, outputs: int) -> None:
    layer = _layer(leading, inputs, outputs, 3)
    _assert_like_largest(ops.kan_linear(*layer), reference.kan_linear(*wide(layer)))
    gradients = ops.kan_linear_backward(torch.randn(*leading, outputs), *layer)
    assert [gradient.shape for gradient in gradients] == [layer[at].shape for at in (0, 2, 3, 4)]
    if 0 in (*leading, inputs, outputs):
        assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_each_argument_has_its_own_dtype_and_strides(dtype: torch.dtype) -> None:
    x, grid, base, spline, scaler = _layer((6,), 4, 3, 3)
    x, spline = x.to(dtype).t().contiguous().t(), spline.to(dtype).transpose(0, 1).contiguous().transpose(0, 1)
    _check([x, grid, base.to(dtype), spline, scaler])
    _check([x, grid, base, spline.float(), scaler.to(dtype).expand(3, 4)])


@pytest.mark.parametrize("order", [0, 3])
def test_points_on_knots_and_at_both_ends(order: int) -> None:
    layer = _layer((1,), 2, 2, order)
    grid = layer[1]
    beside = [grid, grid.nextafter(grid - 1), grid.nextafter(grid + 1), grid[:, :1] - 1, grid[:, -1:] + 1]
    _check([torch.cat(beside, dim=1).t(), *layer[1:]])


@pytest.mark.parametrize("order", [0, 3])
def test_what_is_not_finite_gives_what_the_definition_gives(order: int) -> None:
    layer = _layer((4,), 3, 2, order)
    layer[0][1, 1], layer[0][2, 0], layer[0][3, 2] = torch.nan, torch.inf, -torch.inf
    got, want = ops.kan_linear(*layer), reference.kan_linear(*layer)
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    gradients = ops.kan_linear_backward(torch.ones(4, 2), *layer)
    for value, wanted in zip(gradients, reference.kan_linear_backward(torch.ones(4, 2), *layer), strict=True):
        assert torch.equal(value.isnan(), wanted.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", [0, 1, 3])
def test_far_beyond_the_knots_silu_alone_is_left(order: int, dtype: torch.dtype) -> None:
    x, grid, base, spline, scaler = _layer((6,), 3, 2, order, uniform=True)
    far = torch.tensor([torch.finfo(dtype).max, 1e38, 1e4]).clamp(max=torch.finfo(dtype).max).to(dtype)
    x, grid, base = torch.cat([x.to(dtype), torch.stack([far, -far])]), grid / 8, base.to(dtype) / 1e4
    layer = x, grid, base, spline, scaler
    want = torch.nn.functional.silu(x[6:].double()) @ base.double().t()
    got = ops.kan_linear(*layer)
    assert got.isfinite().all()
    assert_close(got[6:], want, want.abs().max().expand_as(want) * 10, dtype)
    grad = torch.ones(8, 2).to(dtype)
    grad_x, _, grad_spline, grad_scaler = ops.kan_linear_backward(grad, *layer)
    near = ops.kan_linear_backward(grad[:6], x[:6], *layer[1:])
    assert grad_x.isfinite().all()
    assert torch.equal(grad_spline, near[2]) and torch.equal(grad_scaler, near[3])


@pytest.mark.parametrize("order", [1, 3])
def test_splines_are_zero_at_infinity(order: int) -> None:
    _, grid, _, spline, scaler = _layer((1,), 1, 1, order)
    for at in (torch.inf, -torch.inf):
        assert not spline_bases(torch.tensor([at]), grid, order).any()
    x, one = torch.tensor([[torch.inf]]), torch.ones(1, 1)
    assert ops.kan_linear(x, grid, one, spline, scaler).item() == torch.inf
    assert not ops.kan_linear_backward(one, x, grid, one, spline, scaler)[2].any()


def test_a_layer_without_inputs_does_not_look_at_its_rows() -> None:
    rows = 10**12  # a loop over them would take days
    grid, weights = torch.zeros(0, 12), (torch.zeros(0, 0), torch.zeros(0, 0, 8), torch.zeros(0, 0))
    assert ops.kan_linear(torch.zeros(rows, 0), grid, *weights).shape == (rows, 0)
    assert ops.kan_linear_backward(torch.zeros(rows, 0), torch.zeros(rows, 0), grid, *weights)[0].shape == (rows, 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("inputs", "outputs"), [(51, 256), (256, 256), (256, 1)])
def test_the_layers_of_a_predictor(inputs: int, outputs: int) -> None:
    _check(_layer((3,), inputs, outputs, 3, uniform=True))


@pytest.mark.float64
def test_gradcheck_kan_linear() -> None:
    assert torch.autograd.gradcheck(ops.kan_linear, kan_layer())

"""Every op, as the dispatcher serves it on each device, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from cases import (
    COUNTS,
    DTYPES,
    LAYOUTS,
    SHAPES,
    Layout,
    assert_close,
    assert_close_gram,
    contiguous,
    extreme_features,
    predict_scale,
    wide,
)
from torch import Tensor

from lesa_kernels.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ops = torch.ops.lesa


def _parameters(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return contiguous((count,), dtype), contiguous((1,), dtype), contiguous((), dtype)


def _check_predict(shape: tuple[int, ...], dtype: torch.dtype, count: int, layout: Layout, low: bool = False) -> None:
    history = [layout(shape, dtype) for _ in range(count)]
    parameters = _parameters(count, dtype if low or dtype == torch.float64 else torch.float32)
    got = ops.predict(history, *parameters)
    assert got.dtype == dtype and got.shape == shape and got.is_contiguous()
    want = reference.predict(wide(history), *wide(parameters))
    assert_close(got, want, predict_scale(history, *parameters), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_predict_takes_any_shape_and_layout(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> None:
    _check_predict(shape, dtype, 3, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", range(1, 65))
def test_predict_takes_1_to_64_features(count: int, dtype: torch.dtype) -> None:
    _check_predict((67,), dtype, count, contiguous, low=True)


def test_predict_takes_tensors_of_different_layouts() -> None:
    history = [layout((5, 12), torch.float32) for layout in LAYOUTS]
    parameters = _parameters(len(history), torch.float32)
    want = reference.predict(wide(history), *wide(parameters))
    assert_close(ops.predict(history, *parameters), want, predict_scale(history, *parameters), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_in_the_history_reaches_the_forecast(dtype: torch.dtype) -> None:
    history = [torch.ones(40, dtype=dtype) for _ in range(4)]
    history[1][17] = torch.nan
    got = ops.predict(history, torch.zeros(4), torch.zeros(1), torch.ones(1)) if dtype != torch.float64 else None
    if got is None:
        got = ops.predict(history, torch.zeros(4, dtype=dtype), torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype))
    assert torch.isnan(got[17]) and torch.isnan(got).sum() == 1


def test_gradients_of_a_loss_that_is_nan_are_nan() -> None:
    history, target, (weight, bias, gain) = [torch.ones(40)] * 2, torch.zeros(40), _parameters(2, torch.float32)
    for each in (ops.predict_l1, reference.predict_l1):
        results = each(history, target, weight, bias * torch.nan, gain, None)
        assert all(result.isnan().all() for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_to_nearest_even_and_overflows_to_infinity(dtype: torch.dtype) -> None:
    values = torch.cat([torch.randn(1000) * 10.0**power for power in range(-8, 6)]).to(dtype)
    got = ops.predict([values], torch.tensor([0.37]), torch.zeros(1), torch.ones(1))
    want = (values.float() + 0.37 * values.float()).to(dtype)
    # A fused multiply-add may differ by the one ulp that float32 left; most values must be the same.
    assert (got == want).float().mean() > 0.98
    big = torch.full((33,), torch.finfo(dtype).max, dtype=dtype)
    assert torch.isinf(ops.predict([big], torch.ones(1), torch.zeros(1), torch.ones(1))).all()


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_predict_backward(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype, needs_grad: bool) -> None:
    count = 5
    history, grad = [layout(shape, dtype) for _ in range(count)], layout(shape, dtype)
    parameters = _parameters(count, dtype if dtype == torch.float64 else torch.float32)
    got = ops.predict_backward(grad, history, *parameters, needs_grad)
    want = reference.predict_backward(grad.double(), wide(history), *wide(parameters), needs_grad)
    scales = reference.predict_backward(
        grad.double().abs(), [h.abs() for h in wide(history)], *[p.abs() for p in wide(parameters)], needs_grad
    )
    assert len(got[0]) == (count if needs_grad else 0)
    for k in range(len(got[0])):
        assert got[0][k].dtype == dtype
        assert_close(got[0][k], want[0][k], scales[0][k], dtype)
    for k in range(1, 4):
        assert_close(got[k], want[k], scales[k], parameters[k - 1].dtype)


@pytest.mark.parametrize("with_out", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_predict_l1(shape: tuple[int, ...], dtype: torch.dtype, with_out: bool) -> None:
    history, target = [contiguous(shape, dtype) for _ in range(4)], contiguous(shape, dtype)
    parameters = _parameters(4, dtype if dtype == torch.float64 else torch.float32)
    out = torch.empty(shape, dtype=dtype) if with_out else None
    loss, *grads = ops.predict_l1(history, target, *parameters, out)
    wide_out = torch.empty(shape, dtype=torch.float64)
    want, *want_grads = reference.predict_l1(wide(history), target.double(), *wide(parameters), wide_out)
    kind = parameters[0].dtype
    assert loss.dtype == kind
    assert_close(loss, want, want + 1, kind)
    # A sign that turns in float32 changes a gradient by two terms of size |h| / N.
    room = torch.tensor(8.0 / max(wide_out.numel(), 1)).double()
    for gradient, wanted in zip(grads, want_grads, strict=True):
        assert_close(gradient, wanted, wanted.abs() + 1 + room, torch.float32 if kind == torch.float32 else kind)
    if out is not None:
        assert_close(out, wide_out, predict_scale(history, *parameters), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forecast_takes_any_shape_and_layout(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> None:
    _check_forecast(shape, layout, dtype, 4, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", COUNTS)
@pytest.mark.parametrize("count", COUNTS)
def test_forecast_takes_1_to_64_features_and_rows(count: int, rows: int, dtype: torch.dtype) -> None:
    _check_forecast((131,), contiguous, dtype, count, rows)


def _check_forecast(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype, count: int, rows: int) -> None:
    history = [layout(shape, dtype) for _ in range(count)]
    kind = dtype if dtype == torch.float64 else torch.float32
    coefficients, offsets = contiguous((rows, count), kind), contiguous((rows,), kind)
    got = ops.forecast(history, coefficients, offsets)
    want = reference.forecast(wide(history), coefficients.double(), offsets.double())
    scale = reference.forecast([h.abs() for h in wide(history)], coefficients.double().abs(), offsets.double().abs())
    assert len(got) == rows
    for m in range(rows):
        assert got[m].dtype == dtype and got[m].shape == shape and got[m].is_contiguous()
        assert_close(got[m], want[m], scale[m], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:5], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("feature", [(0,), (1,), (7, 9), (2, 1030)], ids=str)
def test_forecast_into_writes_its_slots_and_no_others(
    feature: tuple[int, ...], layout: Layout, dtype: torch.dtype
) -> None:
    ring = layout((6, *feature), dtype)
    before = ring.clone()
    kind = dtype if dtype == torch.float64 else torch.float32
    coefficients, offsets = contiguous((3, 4), kind), contiguous((3,), kind)
    read, write = [0, 2, 2, 4], [4, 5, 0]
    assert ops.forecast_into(ring, coefficients, offsets, read, write) is None
    inputs = [before[slot].double() for slot in read]
    want = reference.forecast(inputs, coefficients.double(), offsets.double())
    scale = reference.forecast([h.abs() for h in inputs], coefficients.double().abs(), offsets.double().abs())
    for slot, row, size in zip(write, want, scale, strict=True):
        assert_close(ring[slot], row, size, dtype)
    for slot in (1, 2, 3):
        assert torch.equal(ring[slot], before[slot])


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_push_copies_and_converts_as_copy_does(layout: Layout, dtype: torch.dtype, source: torch.dtype) -> None:
    for shape in [(), (0,), (5, 67), (1030,)]:
        ring, feature = torch.zeros((3, *shape), dtype=dtype), layout(shape, source)
        ops.push(ring, feature, 1)
        assert torch.equal(ring[1], feature.to(dtype))
        assert not ring[0].any() and not ring[2].any()


def test_push_into_a_strided_ring() -> None:
    ring, feature = torch.zeros(4, 6, 5).transpose(1, 2), torch.randn(5, 6)
    ops.push(ring, feature, 3)
    assert torch.equal(ring[3], feature) and not ring[:3].any()


def _check_gram(features: list[Tensor]) -> None:
    got, want = ops.gram(features), reference.gram(wide(features))
    assert got.dtype == torch.float64 and got.is_contiguous() and torch.equal(got, got.T)
    # Products of 16-bit features are exact in float32, their sums over short blocks are not.
    kind = torch.float32 if features[0].dtype.itemsize == 2 else features[0].dtype
    assert_close(got, want, reference.gram([feature.abs() for feature in wide(features)]), kind)
    assert got[-1, -1] == features[0].numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_takes_any_shape_and_layout(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> None:
    _check_gram([layout(shape, dtype) for _ in range(3)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", range(1, 65))
def test_gram_takes_1_to_64_features(count: int, dtype: torch.dtype) -> None:
    _check_gram([contiguous((1067,), dtype) for _ in range(count)])


def test_gram_takes_tensors_of_different_layouts() -> None:
    _check_gram([layout((5, 12), torch.float32) for layout in LAYOUTS])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_that_is_not_finite_spoils_its_row_of_the_gram_matrix_alone(dtype: torch.dtype, value: float) -> None:
    features = [torch.ones(67, dtype=dtype) for _ in range(6)]
    for position in (3, 66):
        features[1][position] = value
        got = ops.gram(features).isfinite()
        assert not got[1].any() and not got[:, 1].any()
        rest = [0, *range(2, 7)]
        assert got[rest][:, rest].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 67, 1030, 9001])
def test_gram_of_features_whose_products_leave_the_range_of_float32(size: int, dtype: torch.dtype) -> None:
    features = extreme_features((size,), dtype)
    for chosen in (features, [features[2], features[0]], features[1:2], features[3:4], features[4:5]):
        assert_close_gram(ops.gram(chosen), chosen)
    spoiled = [*features, torch.full_like(features[0], torch.inf), torch.zeros_like(features[0])]
    got, kept = ops.gram(spoiled), [*range(len(features)), -1]
    assert_close_gram(got[kept][:, kept], features)
    assert not got[-3].isfinite().any() and not got[-2, [*kept, -2]].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_sums_of_large_and_small_features(scale: float, dtype: torch.dtype) -> None:
    """Means and products that float32 holds come out although every term is far from 1."""
    history = [(torch.randn(9001).double() * scale).to(dtype) for _ in range(4)]
    target, (weight, bias, gain) = (torch.randn(9001).double() * scale).to(dtype), _parameters(4, torch.float32)
    bias = bias * scale
    loss, *grads = ops.predict_l1(history, target, weight, bias, gain, None)
    want, *want_grads = reference.predict_l1(wide(history), target.double(), *wide([weight, bias, gain]), None)
    assert abs(loss.double() - want) <= 1e-5 * want
    for gradient, wanted, size in zip(grads, want_grads, (scale, 1.0, scale), strict=True):
        assert bool(((gradient.double() - wanted).abs() <= 1e-2 * size).all())
    grad = (torch.randn(9001).double() / scale).to(dtype)
    _, *got = ops.predict_backward(grad, history, weight, bias, gain, False)
    magnitudes = [tensor.abs() for tensor in wide([grad, *history, weight, bias, gain])]
    _, *wanted_grads = reference.predict_backward(grad.double(), wide(history), *wide([weight, bias, gain]), False)
    _, *scales = reference.predict_backward(magnitudes[0], magnitudes[1:5], *magnitudes[5:], False)
    for gradient, wanted, total in zip(got, wanted_grads, scales, strict=True):
        assert bool(((gradient.double() - wanted).abs() <= 4e-6 * total).all())


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


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    history = [torch.randn(500_001).bfloat16() for _ in range(8)]
    parameters = _parameters(8, torch.float32)
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

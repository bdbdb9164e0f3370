"""`predict`, its backward and `predict_l1`, as the dispatcher serves them, against their definition in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_inputs import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    Layout,
    assert_close,
    contiguous,
    make_parameters,
    padded,
    predict_scale,
    random,
    transposed,
    wide,
)

from lesa_kernels.ops import predict_l1_loss, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ops = torch.ops.lesa


def _check_predict(shape: tuple[int, ...], dtype: torch.dtype, count: int, layout: Layout, low: bool = False) -> None:
    history = [layout(shape, dtype) for _ in range(count)]
    parameters = make_parameters(count, dtype if low or dtype == torch.float64 else torch.float32)
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
    parameters = make_parameters(len(history), torch.float32)
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
    history, target, (weight, bias, gain) = [torch.ones(40)] * 2, torch.zeros(40), make_parameters(2, torch.float32)
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
    parameters = make_parameters(count, dtype if dtype == torch.float64 else torch.float32)
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
    parameters = make_parameters(4, dtype if dtype == torch.float64 else torch.float32)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_sums_of_large_and_small_features(scale: float, dtype: torch.dtype) -> None:
    """Means and products that float32 holds come out although every term is far from 1."""
    history = [(torch.randn(9001).double() * scale).to(dtype) for _ in range(4)]
    target, (weight, bias, gain) = (torch.randn(9001).double() * scale).to(dtype), make_parameters(4, torch.float32)
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


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_parameters_have_any_strides_shapes_and_dtypes(kind: torch.dtype) -> None:
    history = [contiguous((50,), torch.bfloat16) for _ in range(3)]
    weight, bias, gain = (
        contiguous((6,), kind)[::2],
        contiguous((1, 1, 1), torch.bfloat16),
        contiguous((), torch.float32),
    )
    assert_close(
        ops.predict(history, weight, bias, gain),
        reference.predict(wide(history), *wide([weight, bias, gain])),
        predict_scale(history, weight, bias, gain),
        torch.bfloat16,
    )
    gradients = ops.predict_backward(history[0], history, weight, bias, gain, False)[1:]
    assert [(g.dtype, g.shape) for g in gradients] == [(p.dtype, p.shape) for p in (weight, bias, gain)]


@pytest.mark.parametrize("layout", [contiguous, transposed, padded], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("out_layout", [contiguous, transposed, padded], ids=lambda layout: layout.__name__)
def test_predict_l1_reads_and_writes_any_layout(layout: Any, out_layout: Any) -> None:
    shape, parameters = (9, 14), [torch.randn(3), torch.randn(1), torch.randn(())]
    history, target = [layout(shape, torch.float32) for _ in range(3)], layout(shape, torch.float32)
    out = out_layout(shape, torch.float32)
    got = [*ops.predict_l1(history, target, *parameters, out), out]
    wanted = torch.empty(shape, dtype=torch.float64)
    want = [*reference.predict_l1(wide(history), target.double(), *wide(parameters), wanted), wanted]
    for value, expected in zip(got, want, strict=True):
        assert_close(value, expected, expected.abs() + 1, torch.float32)


def test_the_derivative_of_an_exact_forecast_is_0_and_nan_spreads() -> None:
    history, one = [torch.randn(33)], torch.ones(1)
    exact = ops.predict_l1(history, history[0], 0 * one, 0 * one, one, None)
    assert all(not value.any() for value in exact)
    target = history[0].clone()
    target[7] = torch.nan
    assert all(value.isnan().all() for value in ops.predict_l1(history, target, one, one, one, None))


@pytest.mark.exhaustive
def test_sums_of_4_million_terms_of_one_sign_stay_exact() -> None:
    # Odd, so that the last tile is cut, and of one sign, so that no error cancels.
    history, parameters = [torch.rand(2**22 + 3)], [torch.ones(1), torch.ones(1), torch.ones(())]
    grad = torch.rand_like(history[0])
    got = ops.predict_backward(grad, history, *parameters, False)[1:]
    want = reference.predict_backward(grad.double(), wide(history), *wide(parameters), False)[1:]
    for value, wanted in zip(got, want, strict=True):
        assert_close(value, wanted, wanted, torch.float32)
    got = ops.predict_l1(history, 0 * grad, *parameters, None)
    want = reference.predict_l1(wide(history), 0 * grad.double(), *wide(parameters), None)
    for value, wanted in zip(got, want, strict=True):
        assert_close(value, wanted, wanted, torch.float32)


def test_the_same_input_gives_the_same_bits() -> None:
    history, target = [torch.randn(5000) for _ in range(2)], torch.randn(5000)
    runs = [ops.predict_l1(history, target, torch.ones(2), torch.ones(1), torch.ones(1), None) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(*[ops.gram([*history, target]) for _ in range(2)])


@pytest.mark.float64
def test_gradcheck_predict() -> None:
    history = [random(3, 4) for _ in range(3)]
    inputs = (*history, random(3), random(1), random())
    assert torch.autograd.gradcheck(lambda *a: ops.predict(list(a[:3]), *a[3:]), inputs)


@pytest.mark.float64
def test_gradcheck_predict_l1() -> None:
    history, target = [random(3, 4, grad=False) for _ in range(3)], random(3, 4, grad=False)
    inputs = (random(3), random(1), random())
    assert torch.autograd.gradcheck(lambda w, b, g: predict_l1_loss(history, target, w, b, g), inputs)

"""What launchers promise beside the values: arguments, layouts, order of reads and writes, reductions."""

from __future__ import annotations

from typing import Any

import pytest
import test_ops_errors as errors
import torch
from cases import assert_close, contiguous, padded, predict_scale, transposed, wide
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lesa_kernels.ops import OPS, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize(
    ("op", "arguments", "message"), errors.CASES, ids=[f"{case[0]}-{i}" for i, case in enumerate(errors.CASES)]
)
def test_a_wrong_argument_is_named(lesa: Any, op: str, arguments: tuple[Any, ...], message: str) -> None:
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to(torch.get_default_device()), arguments)
    with pytest.raises(RuntimeError, match=message):
        OPS[op].checked(getattr(lesa, op))(*arguments)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_parameters_have_any_strides_shapes_and_dtypes(lesa: Any, kind: torch.dtype) -> None:
    history = [contiguous((50,), torch.bfloat16) for _ in range(3)]
    weight, bias, gain = (
        contiguous((6,), kind)[::2],
        contiguous((1, 1, 1), torch.bfloat16),
        contiguous((), torch.float32),
    )
    assert_close(
        lesa.predict(history, weight, bias, gain),
        reference.predict(wide(history), *wide([weight, bias, gain])),
        predict_scale(history, weight, bias, gain),
        torch.bfloat16,
    )
    matrix, offsets = contiguous((3, 4), kind).t(), contiguous((8,), torch.float32)[::2]
    want = reference.forecast(wide(history), matrix.double(), offsets.double())
    scale = reference.forecast([h.abs() for h in wide(history)], matrix.double().abs(), offsets.double().abs())
    for row, wanted, size in zip(lesa.forecast(history, matrix, offsets), want, scale, strict=True):
        assert_close(row, wanted, size, torch.bfloat16)
    gradients = lesa.predict_backward(history[0], history, weight, bias, gain, False)[1:]
    assert [(g.dtype, g.shape) for g in gradients] == [(p.dtype, p.shape) for p in (weight, bias, gain)]


def test_a_coefficient_of_0_multiplies(lesa: Any) -> None:
    history = [torch.ones(40), torch.full((40,), torch.nan)]
    assert lesa.forecast(history, torch.tensor([[1.0, 0.0]]), torch.zeros(1))[0].isnan().all()


@pytest.mark.parametrize("slots", [1, 4, 12])
@pytest.mark.parametrize("size", [2048, 2047])
def test_forecasts_of_a_ring_may_overwrite_all_their_inputs(lesa: Any, slots: int, size: int) -> None:
    ring = torch.randn(slots, size)
    before, matrix, offsets = ring.clone(), torch.randn(slots, slots), torch.randn(slots)
    write = [*range(slots)][::-1]
    lesa.forecast_into(ring, matrix, offsets, range(slots), write)
    want = reference.forecast(wide(before), matrix.double(), offsets.double())
    scale = reference.forecast(wide(before.abs()), matrix.double().abs(), offsets.double().abs())
    for slot, wanted, of_terms in zip(write, want, scale, strict=True):
        assert_close(ring[slot], wanted, of_terms, torch.float32)


def test_a_feature_may_be_pushed_onto_itself(lesa: Any) -> None:
    ring = torch.randn(3, 100)
    before = ring.clone()
    lesa.push(ring, ring[1], 1)
    assert torch.equal(ring, before)


@pytest.mark.parametrize("layout", [contiguous, transposed, padded], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("out_layout", [contiguous, transposed, padded], ids=lambda layout: layout.__name__)
def test_predict_l1_reads_and_writes_any_layout(lesa: Any, layout: Any, out_layout: Any) -> None:
    shape, parameters = (9, 14), [torch.randn(3), torch.randn(1), torch.randn(())]
    history, target = [layout(shape, torch.float32) for _ in range(3)], layout(shape, torch.float32)
    out = out_layout(shape, torch.float32)
    got = [*lesa.predict_l1(history, target, *parameters, out), out]
    wanted = torch.empty(shape, dtype=torch.float64)
    want = [*reference.predict_l1(wide(history), target.double(), *wide(parameters), wanted), wanted]
    for value, expected in zip(got, want, strict=True):
        assert_close(value, expected, expected.abs() + 1, torch.float32)


@pytest.mark.parametrize("count", [1, 8, 9, 16, 17, 25])
def test_gram_takes_features_of_any_layouts_in_groups(lesa: Any, count: int) -> None:
    layouts = [contiguous, transposed, padded]
    features = [layouts[k % 3]((9, 14), torch.float32) + k for k in range(count)]
    got = lesa.gram(features)
    assert torch.equal(got, got.T) and got[-1, -1] == 126
    want, scale = reference.gram(wide(features)), reference.gram([feature.abs() for feature in wide(features)])
    assert_close(got, want, scale, torch.float32)


def test_gram_of_features_permuted_alike_copies_nothing(lesa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    features = [transposed((9, 14), torch.bfloat16) for _ in range(3)]
    want = reference.gram(wide(features))
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("a feature is copied"))
    assert_close(lesa.gram(features), want, 126 * torch.ones(4, 4, dtype=torch.float64), torch.float32)


def test_the_derivative_of_an_exact_forecast_is_0_and_nan_spreads(lesa: Any) -> None:
    history, one = [torch.randn(33)], torch.ones(1)
    exact = lesa.predict_l1(history, history[0], 0 * one, 0 * one, one, None)
    assert all(not value.any() for value in exact)
    target = history[0].clone()
    target[7] = torch.nan
    assert all(value.isnan().all() for value in lesa.predict_l1(history, target, one, one, one, None))


@pytest.mark.exhaustive
def test_sums_of_4_million_terms_of_one_sign_stay_exact(lesa: Any) -> None:
    # Odd, so that the last tile is cut, and of one sign, so that no error cancels.
    history, parameters = [torch.rand(2**22 + 3)], [torch.ones(1), torch.ones(1), torch.ones(())]
    grad = torch.rand_like(history[0])
    got = lesa.predict_backward(grad, history, *parameters, False)[1:]
    want = reference.predict_backward(grad.double(), wide(history), *wide(parameters), False)[1:]
    for value, wanted in zip(got, want, strict=True):
        assert_close(value, wanted, wanted, torch.float32)
    got = lesa.predict_l1(history, 0 * grad, *parameters, None)
    want = reference.predict_l1(wide(history), 0 * grad.double(), *wide(parameters), None)
    for value, wanted in zip(got, want, strict=True):
        assert_close(value, wanted, wanted, torch.float32)


def test_the_same_input_gives_the_same_bits(lesa: Any) -> None:
    history, target = [torch.randn(5000) for _ in range(2)], torch.randn(5000)
    runs = [lesa.predict_l1(history, target, torch.ones(2), torch.ones(1), torch.ones(1), None) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert torch.equal(*[lesa.gram([*history, target]) for _ in range(2)])

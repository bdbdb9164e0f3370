"""`forecast`, `forecast_into` and `push`, as the dispatcher serves them, against their definition in float64."""

from __future__ import annotations

import pytest
import torch
from op_inputs import COUNTS, DTYPES, LAYOUTS, SHAPES, Layout, assert_close, contiguous, random, wide

from lesa_kernels.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ops = torch.ops.lesa


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


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_coefficients_have_any_strides_and_dtypes(kind: torch.dtype) -> None:
    history = [contiguous((50,), torch.bfloat16) for _ in range(3)]
    matrix, offsets = contiguous((3, 4), kind).t(), contiguous((8,), torch.float32)[::2]
    want = reference.forecast(wide(history), matrix.double(), offsets.double())
    scale = reference.forecast([h.abs() for h in wide(history)], matrix.double().abs(), offsets.double().abs())
    for row, wanted, size in zip(ops.forecast(history, matrix, offsets), want, scale, strict=True):
        assert_close(row, wanted, size, torch.bfloat16)


def test_a_coefficient_of_0_multiplies() -> None:
    history = [torch.ones(40), torch.full((40,), torch.nan)]
    assert ops.forecast(history, torch.tensor([[1.0, 0.0]]), torch.zeros(1))[0].isnan().all()


@pytest.mark.parametrize("slots", [1, 4, 12])
@pytest.mark.parametrize("size", [2048, 2047])
def test_forecasts_of_a_ring_may_overwrite_all_their_inputs(slots: int, size: int) -> None:
    ring = torch.randn(slots, size)
    before, matrix, offsets = ring.clone(), torch.randn(slots, slots), torch.randn(slots)
    write = [*range(slots)][::-1]
    ops.forecast_into(ring, matrix, offsets, range(slots), write)
    want = reference.forecast(wide(before), matrix.double(), offsets.double())
    scale = reference.forecast(wide(before.abs()), matrix.double().abs(), offsets.double().abs())
    for slot, wanted, of_terms in zip(write, want, scale, strict=True):
        assert_close(ring[slot], wanted, of_terms, torch.float32)


def test_a_feature_may_be_pushed_onto_itself() -> None:
    ring = torch.randn(3, 100)
    before = ring.clone()
    ops.push(ring, ring[1], 1)
    assert torch.equal(ring, before)


@pytest.mark.float64
def test_gradcheck_forecast() -> None:
    inputs = (*[random(3, 4) for _ in range(3)], random(2, 3), random(2))
    assert torch.autograd.gradcheck(lambda *a: tuple(ops.forecast(list(a[:3]), *a[3:])), inputs)
    assert torch.autograd.gradgradcheck(lambda *a: tuple(ops.forecast(list(a[:3]), *a[3:])), inputs)

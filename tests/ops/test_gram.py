"""`gram`, as the dispatcher serves it, against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from op_inputs import (
    DTYPES,
    LAYOUTS,
    SHAPES,
    Layout,
    assert_close,
    assert_close_gram,
    contiguous,
    extreme_features,
    padded,
    transposed,
    wide,
)
from torch import Tensor

from lesa_kernels.ops import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ops = torch.ops.lesa


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


@pytest.mark.parametrize("count", [1, 8, 9, 16, 17, 25])
def test_gram_takes_features_of_any_layouts_in_groups(count: int) -> None:
    layouts = [contiguous, transposed, padded]
    features = [layouts[k % 3]((9, 14), torch.float32) + k for k in range(count)]
    got = ops.gram(features)
    assert torch.equal(got, got.T) and got[-1, -1] == 126
    want, scale = reference.gram(wide(features)), reference.gram([feature.abs() for feature in wide(features)])
    assert_close(got, want, scale, torch.float32)

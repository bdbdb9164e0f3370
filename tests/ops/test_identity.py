"""`identity`, as the dispatcher serves it. The tests of a new op start as a copy of this file."""

from __future__ import annotations

import pytest
import torch
from op_inputs import DTYPES, LAYOUTS, SHAPES, Layout, random

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ops = torch.ops.lesa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_identity_copies_any_shape_and_layout(shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> None:
    feature = layout(shape, dtype)
    got = ops.identity(feature)
    assert got.dtype == dtype and got.is_contiguous() and torch.equal(got, feature)
    assert got.numel() == 0 or got.data_ptr() != feature.data_ptr()


@pytest.mark.float64
def test_gradcheck_identity() -> None:
    assert torch.autograd.gradcheck(ops.identity, random(3, 4))
    assert torch.autograd.gradgradcheck(ops.identity, random(3, 4))

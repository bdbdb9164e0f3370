"""The tests of tests/ops/test_gram.py, with Triton's launchers in place of the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_inputs import assert_close, transposed, wide
from torch import Tensor
from triton_engines import shared_tests

from lesa_kernels.ops import reference
from tests.ops import test_gram as of_ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")
globals().update(shared_tests(of_ops))


def test_gram_of_features_permuted_alike_copies_nothing(lesa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    features = [transposed((9, 14), torch.bfloat16) for _ in range(3)]
    want = reference.gram(wide(features))
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("a feature is copied"))
    assert_close(lesa.gram(features), want, 126 * torch.ones(4, 4, dtype=torch.float64), torch.float32)

"""The CUDA kernels and Triton's against the reference, and each against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lesa_kernels.ops import OPS
from tools.gpu_check.calls import CALLS, Call

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_every_op_is_tested_here() -> None:
    assert set(CALLS) == set(OPS)


def test_an_op_matches_the_reference_whoever_serves_it(call: Call, ops: Any) -> None:
    assert not call.wrong(call.run(ops))


def test_the_same_input_gives_the_same_bits(call: Call, ops: Any) -> None:
    first = [output.clone() for output in call.run(ops)]
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, call.run(ops), strict=True))


def test_float64_features_are_refused() -> None:
    history = [torch.ones(3, device="cuda", dtype=torch.float64)]
    one = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match=r"must have a dtype of float32, float16, bfloat16, got float64"):
        torch.ops.lesa.predict(history, one, one, one)

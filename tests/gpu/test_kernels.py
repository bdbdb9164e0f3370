"""The CUDA kernels and Triton's against the reference, and each against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import DEVICE, STEPS, Step

from lesa_kernels.ops import OPS

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_every_op_is_tested_here() -> None:
    assert set(STEPS) == set(OPS)


def test_an_op_matches_the_reference_whoever_serves_it(step: Step, ops: Any) -> None:
    step.check(step.run(ops))


def test_the_same_input_gives_the_same_bits(step: Step, ops: Any) -> None:
    first = [output.clone() for output in step.run(ops)]
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step.run(ops), strict=True))


def test_float64_features_are_refused(ops: Any) -> None:
    history = [torch.ones(3, device=DEVICE, dtype=torch.float64)]
    one = torch.ones(1, device=DEVICE)
    with pytest.raises(
        (TypeError, RuntimeError), match=r"must have a dtype of float32, float16, bfloat16, got float64"
    ):
        ops.predict(history, one, one, one)

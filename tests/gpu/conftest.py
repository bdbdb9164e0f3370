"""Tests of what only a GPU can show. Without one, test_device.py skips and says so; the others are not collected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from steps import STEPS, Step, implementations

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_[!d]*.py"]


@pytest.fixture(params=["lesa", "triton"])
def ops(request: pytest.FixtureRequest) -> Any:
    """The ops as the dispatcher serves them, then Triton's kernels called directly."""
    return implementations()[request.param]


@pytest.fixture(params=[torch.bfloat16, torch.float32, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=STEPS)
def step(request: pytest.FixtureRequest, dtype: torch.dtype) -> Step:
    """One op with inputs of a dtype."""
    return STEPS[request.param](dtype)

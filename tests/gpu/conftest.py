"""Tests of what only a GPU can show. Without one, test_device.py skips and says so; the others are not collected."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tools.gpu_check.calls import CALLS, ODD, Call, namespaces

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_[!d]*.py"]


DEVICE = torch.device("cuda")


@pytest.fixture(params=["lesa", "triton"])
def ops(request: pytest.FixtureRequest) -> Any:
    """The ops as the dispatcher serves them, then Triton's kernels called directly."""
    return namespaces()[request.param]


@pytest.fixture(autouse=True)
def _freed() -> Iterator[None]:
    """Give back what a test held, a failed one too."""
    yield
    torch.cuda.empty_cache()


@pytest.fixture(params=[torch.bfloat16, torch.float32, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=CALLS)
def call(request: pytest.FixtureRequest, dtype: torch.dtype) -> Call:
    """A call of one op with inputs of a dtype."""
    with DEVICE:
        return CALLS[request.param](dtype, ODD)

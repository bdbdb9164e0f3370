"""Fixtures for all tests: a fixed seed, and fresh memory poisoned with NaN so that a missing write shows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every fresh tensor with NaN while the test runs."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def flux_sigmas() -> list[float]:
    """The 51 noise levels of 50 steps under FLUX's time shift, mu = 1.15."""
    shift = math.exp(1.15)
    levels = [1 - step / 50 for step in range(50)]
    return [shift / (shift + (1 / level - 1)) for level in levels] + [0.0]

"""Fixtures for all tests: a fixed seed, and fresh memory poisoned with NaN so that a missing write shows."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from instruction_set import follow_torch

# torch reads it once, at the first product of matrices on CUDA, and demands it for deterministic algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# `make fuzz` asks for the long one.
settings.register_profile("short", derandomize=True, deadline=None, max_examples=100)
settings.register_profile("long", deadline=None, max_examples=10_000)
settings.load_profile("short")


def pytest_configure(config: pytest.Config) -> None:
    """Run all tests with the instruction set that torch was told to use."""
    follow_torch()
    if wanted := os.environ.get("ATEN_CPU_CAPABILITY"):
        # What inductor compiled for one instruction set it takes from its cache for another, and computes half of it.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(config.rootpath / "build" / "tests" / f"inductor-{wanted}")


# Folder or file of tests -> the package without which it cannot even be imported.
NEEDED = {
    "integrations": "diffusers",
    "digits": "diffusers",
    "emoji": "diffusers",
    "triton": "triton",
    "fuzz/test_fuzz_loops.py": "diffusers",
    "benchmarks/test_forecasters.py": "diffusers",
    "benchmarks/test_history.py": "diffusers",
    "benchmarks/test_hooks.py": "diffusers",
    "benchmarks/test_quality.py": "diffusers",
}


def _needed(path: Path) -> str | None:
    return NEEDED.get(path.parent.name) or NEEDED.get(f"{path.parent.name}/{path.name}")


class _Unimportable(pytest.Module):
    """A file of tests that is skipped as a whole."""

    def collect(self) -> Any:
        package = _needed(self.path)
        extra = "test" if package == "triton" else package
        pytest.skip(f"{package} is not installed (extra: {extra})", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Skip what needs a package that is not there, with the reason."""
    package = _needed(module_path)
    spec = None if package is None else importlib.util.find_spec(package)
    if package is None or (spec is not None and spec.origin is not None):  # a folder of that name, as here, has none
        return None
    return _Unimportable.from_parent(parent, path=module_path)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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

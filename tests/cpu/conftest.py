"""Fixtures of the tests of the C++ kernels: each instruction set in turn, and the number of threads put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cpu_library import ISAS, facts, native


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with one instruction set."""
    library, before = native(), facts()["chosen"]
    if library.lesa_cpu_set_isa(request.param.encode()):
        pytest.skip(f"this processor lacks {request.param}, it has {', '.join(facts()['supported'])}")
    yield request.param
    library.lesa_cpu_set_isa(before.encode())


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The models are small: more threads than free cores would spend their time waiting for each other."""

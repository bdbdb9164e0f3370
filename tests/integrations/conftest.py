from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import pytest

from lesa_kernels import Plan, Session
from lesa_kernels.integrations import state

if TYPE_CHECKING:
    from tiny_flux import TinyPipeline


@pytest.fixture
def pipe() -> TinyPipeline:
    from tiny_flux import tiny_pipeline  # needs diffusers: without it these tests are skipped

    return tiny_pipeline()


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[Session]:
    """The sessions that are alive."""
    alive: weakref.WeakSet[Session] = weakref.WeakSet()

    class Registered(Session):
        def __init__(self, plan: Plan, **options: Any) -> None:
            super().__init__(plan, **options)
            alive.add(self)

    monkeypatch.setattr(state, "Session", Registered)
    return alive

from __future__ import annotations

import pytest

from benchmarks import cases


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.SIZES, "tiny", (3, 5))
    monkeypatch.setitem(cases.SIZES, "two huge pages", (2**20,))
    monkeypatch.setitem(cases.SIZES, "long", (9, 5))
    monkeypatch.setattr(cases, "POOL", 20)
    monkeypatch.setattr(cases, "CHECKED", 20)

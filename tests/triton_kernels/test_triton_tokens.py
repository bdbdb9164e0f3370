"""The tests of tests/ops/test_token_ops.py, with Triton's launchers in place of the dispatcher."""

from __future__ import annotations

from typing import Any

import pytest
import test_token_ops as of_ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _triton_serves(lesa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_ops, "ops", lesa)


_OF_THE_CPU = {"test_results_do_not_depend_on_the_number_of_threads"}
globals().update(
    {name: vars(of_ops)[name] for name in dir(of_ops) if name.startswith("test_") and name not in _OF_THE_CPU}
)

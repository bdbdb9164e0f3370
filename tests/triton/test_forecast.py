"""The tests of tests/ops/test_forecast.py, with Triton's launchers in place of the dispatcher."""

from __future__ import annotations

import pytest
from triton_engines import shared_tests

from tests.ops import test_forecast as of_ops

pytestmark = pytest.mark.usefixtures("poisoned_memory")
globals().update(shared_tests(of_ops))

"""Writes a record of each test as soon as it ends, and frees what a failed one held: a plugin of pytest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.gpu_check.records import FAILED, LEFT_OUT, PASSED, Record, append


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take the file of the records and the phase that they belong to."""
    parser.addoption("--records", type=Path, required=True)
    parser.addoption("--phase", required=True)


class _Writer:
    """Writes records of tests."""

    def __init__(self, path: Path, phase: str) -> None:
        self.path, self.phase = path, phase

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write what is worth it: how the test itself ended, or why it was not reached."""
        if report.when != "call" and report.passed:
            return
        status = {"passed": PASSED, "skipped": LEFT_OUT}.get(report.outcome, FAILED)
        text = "" if report.passed else report.longreprtext[-2000:]
        append(Record(self.phase, report.nodeid, status, text, report.duration), self.path)
        if report.failed and torch.cuda.is_available():
            torch.cuda.empty_cache()


def pytest_configure(config: pytest.Config) -> None:
    """Start to write."""
    config.pluginmanager.register(_Writer(config.getoption("--records"), config.getoption("--phase")))

"""The figures of what Triton's kernels cost the host."""

from __future__ import annotations

import subprocess
import sys

import pytest


def test_all_ops_are_compiled_and_called_without_a_gpu() -> None:
    """In a process of its own: kernels keep the launcher that does nothing."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.triton_host", "--count", "3", "--repeats", "1"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for op in ("predict ", "forecast, M = 6 ", "forecast, M = 64 ", "predict_l1 ", "predict_backward ", "gram "):
        seconds, microseconds = (line.split("│") for line in lines if f"│ {op}" in line)
        assert float(seconds[2]) >= 0 and 0 < float(microseconds[2]) <= float(microseconds[3])

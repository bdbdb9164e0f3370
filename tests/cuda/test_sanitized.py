"""The tests of this folder on the engine `host`: AddressSanitizer and UBSan watch every access of the kernels.

They run in a process of their own, into which libasan is loaded before Python allocates anything.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from engines import sanitizer_runtime

HERE = Path(__file__).resolve().parent


def run_sanitized(arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    runtime = sanitizer_runtime()
    if runtime is None:
        pytest.skip("g++ with libasan is not installed")
    options = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1"}
    # A report goes past Python to the process's own stderr.
    flags = ["--engine=host", "--capture=sys", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", *flags, *map(str, arguments)]
    environment = {**os.environ, **options}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], check=False)


@pytest.mark.parametrize("path", sorted(set(HERE.glob("test_*.py")) - {Path(__file__)}), ids=lambda path: path.stem)
def test_on_the_host_under_sanitizers(path: Path, pytestconfig: pytest.Config) -> None:
    result = run_sanitized([path, "-m", str(pytestconfig.getoption("-m"))])
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-6000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize(
    ("fault", "report"),
    [
        ("one_element_too_far", "heap-buffer-overflow"),
        ("a_vector_at_an_odd_address", "misaligned address"),
        ("a_barrier_that_one_warp_misses", "waits in a barrier that others do not reach"),
        ("a_shuffle_that_one_lane_misses", "waits in a shuffle that others do not reach"),
    ],
)
def test_the_watch_is_awake(fault: str, report: str) -> None:
    result = run_sanitized([HERE / "planted_faults.py", "-k", fault])
    assert result.returncode != 0
    assert report in result.stdout + result.stderr

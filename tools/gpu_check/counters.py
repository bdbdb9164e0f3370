"""Reads hardware counters of the main kernels with Nsight Compute."""

from __future__ import annotations

import csv
import shutil
import sys
import time
from collections.abc import Iterable

from tools.gpu_check.launches import MARK, titles
from tools.gpu_check.processes import run_all
from tools.gpu_check.records import CUT, LEFT_OUT, PASSED, Record
from tools.gpu_check.settings import COUNTERS, ROOT, Settings

PHASE = "counters"
# Name in reports -> metric of Nsight Compute.
DURATION = {"duration": "gpu__time_duration.sum"}
METRICS = {
    **DURATION,
    "DRAM % of peak": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "DRAM read": "dram__bytes_read.sum",
    "DRAM written": "dram__bytes_write.sum",
    "warps active %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "issue slots %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "stall long scoreboard": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "stall lg throttle": "smsp__average_warps_issue_stalled_lg_throttle_per_issue_active.ratio",
    "stall math pipe": "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
    "stall barrier": "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "registers": "launch__registers_per_thread",
    "grid": "launch__grid_size",
    "block": "launch__block_size",
}
UNITS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "usecond": 1.0, "nsecond": 1e-3, "msecond": 1e3}  # to microseconds
BYTES = {"byte": 1e-6, "Kbyte": 1e-3, "Mbyte": 1.0, "Gbyte": 1e3}  # to MB
LEAST_SECONDS = 15
PLACES = ("ncu", "/usr/local/cuda/bin/ncu")


def run(settings: Settings, seconds: float) -> None:
    """Profile the launches, where there is a profiler."""
    profiler = next(filter(None, map(shutil.which, PLACES)), None)
    launches = [sys.executable, "-m", "tools.gpu_check.launches", settings.device]
    if settings.device == "cpu" or profiler is None:
        reason = "a dry run: launched without it" if settings.device == "cpu" else "ncu was not found: launched only"
        job = settings.job("launches", launches)
        run_all([job], ROOT, settings.env(), seconds)
        settings.record(Record(PHASE, "Nsight Compute", LEFT_OUT, reason))
        settings.record_end(PHASE, job)
        return
    begin = time.monotonic()
    # A metric that this chip lacks must not cost the others: then the duration alone.
    for metrics in (METRICS, DURATION):
        left = seconds - (time.monotonic() - begin)
        if left < LEAST_SECONDS:
            break
        path = settings.out / COUNTERS
        path.unlink(missing_ok=True)
        options = ["--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
        options += ["--profile-from-start", "off", "--metrics", ",".join(metrics.values()), "--log-file", str(path)]
        # The profiler writes when the program ends, so it has to end in time.
        command = [profiler, *options, *launches, f"{left - LEAST_SECONDS:.0f}"]
        job = settings.job(f"counters-{len(metrics)}", command)
        run_all([job], ROOT, settings.env(), left)
        found = parsed(path.read_text(errors="replace").splitlines() if path.exists() else ())
        for title, kernels in found.items():
            for number, values in enumerate(kernels):
                settings.record(
                    Record(PHASE, f"{title}, kernel {number}", PASSED, str(values.pop("kernel")), 0, values)
                )
        settings.record_end(PHASE, job)
        missing = [title for title in titles() if title not in found]
        if found or job.timed_out:
            if missing:
                settings.record(Record(PHASE, "launches", CUT, f"not reached: {'; '.join(missing)}"))
            break


def parsed(lines: Iterable[str]) -> dict[str, list[dict[str, float | str]]]:
    """Read what Nsight Compute printed.

    Args:
        lines: its page "raw" as CSV: messages that start with "==", names, units, a line for each kernel.

    Returns:
        What was launched -> of each of its kernels the name and its figures: times in microseconds, bytes in MB.
    """
    rows = list(csv.reader(line for line in lines if line.startswith('"')))
    if len(rows) < 3:
        return {}
    names, units, *kernels = rows
    found: dict[str, list[dict[str, float | str]]] = {}
    marks = -1
    for row in kernels:
        cells = dict(zip(names, zip(row, units, strict=False), strict=False))
        kernel = cells["Kernel Name"][0]
        if MARK in kernel:
            marks += 1
        elif 0 <= marks < len(titles()):
            figures = {name: _number(*cells[metric]) for name, metric in METRICS.items() if metric in cells}
            found.setdefault(titles()[marks], []).append({"kernel": kernel, **figures})
    return found


def _number(text: str, unit: str) -> float | str:
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return text
    return value * UNITS.get(unit, BYTES.get(unit, 1.0))

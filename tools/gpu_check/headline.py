"""Compiles what the benchmark compiles, then times its headline cases."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tools.gpu_check.processes import Job, run_all
from tools.gpu_check.records import PASSED, Record
from tools.gpu_check.settings import CLOCKS, RESULTS, ROOT, Settings

CLOCK_FIELDS = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu"


def options(settings: Settings) -> list[str]:
    """Return the options that choose the cases."""
    return ["--device", settings.device, "--headline"]


def run_compile(settings: Settings, seconds: float) -> None:
    """Compile in parallel processes into one cache, so that nothing compiles while something is timed."""
    count = max(1, min(settings.cores // 2, 8))
    jobs = [
        settings.module(
            f"compile-{part}", "benchmarks", *options(settings), "--only-compile", "--part", f"{part}/{count}"
        )
        for part in range(1, count + 1)
    ]
    run_all(jobs, ROOT, settings.env(), seconds, count, lambda job: settings.record_end("compile", job))
    finished = sum(job.code == 0 for job in jobs)
    settings.record(Record("compile", "processes", PASSED, f"{finished} of {count} finished"))


def run(settings: Settings, seconds: float) -> None:
    """Time serially: nothing may disturb it."""
    files = ["--save", "--out", str(settings.out / RESULTS), "--seconds", f"{0.9 * seconds:.0f}"]
    job = settings.module("headline", "benchmarks", *options(settings), *files)

    def ended(job: Job) -> None:
        settings.record_end("headline", job)
        for line in job.text().splitlines():
            if "left out" in line or "dropped" in line:
                settings.record(Record("headline", "note", PASSED, line.strip()))

    with _clocks_recorded(settings):
        run_all([job], ROOT, settings.env(), seconds, ended=ended)


@contextmanager
def _clocks_recorded(settings: Settings) -> Iterator[None]:
    """Write the GPU's clocks, power and temperature into the report, every second."""
    if settings.device == "cpu" or shutil.which("nvidia-smi") is None:
        yield
        return
    query = f"--query-gpu={CLOCK_FIELDS}"
    command = ["nvidia-smi", query, "--format=csv", "-l", "1", "-f", str(settings.out / CLOCKS)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()

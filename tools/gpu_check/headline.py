"""Compiles what the benchmark compiles, then times its headline cases."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tools.gpu_check.processes import run_all
from tools.gpu_check.records import FAILED, LEFT_OUT, PASSED, Record
from tools.gpu_check.settings import CLOCKS, RESULTS, ROOT, Settings

CLOCK_FIELDS = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu"


def options(settings: Settings) -> list[str]:
    """Return the options that choose the cases."""
    # A rehearsal needs no compiler of C++, which takes longer than all the rest.
    few = ["--op", "push", "--op", "gram"] if settings.device == "cpu" else []
    return ["--device", settings.device, "--headline", *few]


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
    lines = settings.work / "logs" / "headline.jsonl"
    files = ["--save", "--out", str(settings.out / RESULTS), "--jsonl", str(lines)]
    job = settings.module("headline", "benchmarks", *options(settings), *files, "--seconds", f"{0.9 * seconds:.0f}")
    with _clocks_recorded(settings):
        run_all([job], ROOT, settings.env(), seconds)
    contents = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    for found in (content for content in contents if "dropped" in content):
        status = FAILED if found["wrong"] and found["ours"] else LEFT_OUT
        name = f"{found['op']} at {found['size']}, {found['variant'] or 'all variants'}"
        settings.record(Record("headline", name, status, found["dropped"]))
    rows = sum("median_s" in content for content in contents)
    if rows:
        settings.record(Record("headline", "rows", PASSED, f"{rows} rows measured"))
    # A wrong result of ours, for which it ends with status 1, was written down above.
    if job.timed_out or not contents:
        settings.record_end("headline", job)


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

"""Compiles what the benchmark compiles, then times its headline cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import CAPTURED, NO_TIME
from tools.gpu_check.load import serve
from tools.gpu_check.processes import run_all
from tools.gpu_check.records import CUT, FAILED, LEFT_OUT, PASSED, Record, load
from tools.gpu_check.settings import RECORDS, RESULTS, ROOT, Settings

REPEATS = 9
LAST_CASE_SECONDS = 35
"""Kept back for imports and for the case that is being measured when no further one may start."""


def options(settings: Settings) -> list[str]:
    """Return the options that choose the cases."""
    # A rehearsal needs no compiler of C++, which takes longer than all the rest.
    few = ["--op", "push", "--op", "gram"] if settings.device == "cpu" else []
    return ["--device", settings.device, "--headline", "--repeats", str(REPEATS), *few]


def run_compile(settings: Settings, seconds: float) -> None:
    """Compile in parallel processes into one cache, so that nothing compiles while something is timed."""
    count = max(1, min(settings.cores, 16))
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
    if settings.device == "cuda" and not serve(load(settings.out / RECORDS)):
        reason = "compiled kernels do not serve: nothing may be timed under their name"
        settings.record(Record("headline", "benchmark", LEFT_OUT, reason))
        return
    lines = settings.work / "logs" / "headline.jsonl"
    files = ["--save", "--out", str(settings.out / RESULTS), "--jsonl", str(lines)]
    files += ["--seconds", f"{max(seconds - LAST_CASE_SECONDS, 5):.0f}"]
    job = settings.module("headline", "benchmarks", *options(settings), *files)
    run_all([job], ROOT, settings.env(), seconds)
    contents = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    for found in (content for content in contents if "dropped" in content):
        status = status_of(found)
        name = f"{found['op']} at {found['size']}, {found['variant'] or 'all variants'}"
        settings.record(Record("headline", name, status, found["dropped"]))
    rows = sum("median_s" in content for content in contents)
    if rows:
        settings.record(Record("headline", "rows", PASSED, f"{rows} rows measured"))
    # A wrong result of ours, for which it ends with status 1, was written down above.
    if job.timed_out or not contents or job.code not in (0, 1):
        settings.record_end("headline", job)


def status_of(dropped: Mapping[str, Any]) -> str:
    """Return what a variant that was not timed comes to: ours must be right and run, though not inside of a graph."""
    if dropped["dropped"].startswith(NO_TIME):
        return CUT
    ours = dropped["ours"] and (dropped["wrong"] or not dropped["variant"].endswith(CAPTURED))
    return FAILED if ours or "CUDA error" in dropped["dropped"] else LEFT_OUT

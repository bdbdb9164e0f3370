"""Runs every op once under compute-sanitizer."""

from __future__ import annotations

import re
import shutil
import sys

from tools.gpu_check.calls import CALLS
from tools.gpu_check.processes import Job, run_all
from tools.gpu_check.records import CUT, FAILED, LEFT_OUT, PASSED, Record
from tools.gpu_check.settings import ROOT, Settings

PHASE = "memcheck"
FOUND = 86
TOOLS: dict[str, tuple[str, ...]] = {
    "memcheck": ("--report-api-errors", "no"),  # torch asks CUDA questions that it may refuse
    "racecheck": ("--kernel-name", "kns=lesa"),
    "synccheck": ("--kernel-name", "kns=lesa"),
}
PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def run(settings: Settings, seconds: float) -> None:
    """Run the tools side by side, where they are."""
    sanitizer = next(filter(None, map(shutil.which, PLACES)), None)
    if settings.device == "cpu" or sanitizer is None:
        reason = "a dry run" if settings.device == "cpu" else "compute-sanitizer was not found"
        settings.record(Record(PHASE, "compute-sanitizer", LEFT_OUT, reason))
        return
    scratch = settings.work / "logs" / "memcheck.jsonl"
    program = [sys.executable, "-m", "tools.gpu_check.smoke", settings.device, "lesa", str(scratch), "--quick", *CALLS]
    shared = ["--target-processes", "application-only", "--error-exitcode", str(FOUND)]
    jobs = [settings.job(tool, [sanitizer, "--tool", tool, *shared, *more, *program]) for tool, more in TOOLS.items()]

    def ended(job: Job) -> None:
        status, text = verdict(job)
        settings.record(Record(PHASE, job.name, status, text, job.seconds))

    # Without torch's cache each tensor is an allocation of its own, and an access past its end is seen.
    run_all(jobs, ROOT, settings.env(PYTORCH_NO_CUDA_MEMORY_CACHING="1"), seconds, len(jobs), ended)


def verdict(job: Job) -> tuple[str, str]:
    """Return how a tool ended and what to say of it: one that could not run has proven nothing, right or wrong."""
    summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*", job.text())
    if job.timed_out:
        return CUT, f"not finished after {job.seconds:.0f} s"
    if job.code == FOUND:
        return FAILED, "\n".join([*summary[-1:], job.tail()])
    if not summary:
        return LEFT_OUT, f"could not run here: {job.tail(1) or 'no output'}"
    return (PASSED if job.code == 0 else FAILED), summary[-1]

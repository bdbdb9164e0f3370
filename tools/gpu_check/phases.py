"""Runs the phases of a check, each within its limit; none stops another."""

from __future__ import annotations

import tarfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tools.gpu_check import counters, full_size, gpu_suite, headline, load, memcheck, smoke
from tools.gpu_check.gpu_report import write
from tools.gpu_check.records import CUT, FAILED, SUMMARY, Record, worst
from tools.gpu_check.records import load as load_records
from tools.gpu_check.settings import LOGS, RECORDS, REPORT, Settings

PACKING_SECONDS = 5
"""Kept back for the logs and the report."""
LEAST_SECONDS = 3


@dataclass(frozen=True)
class Phase:
    """A part of the check.

    Args:
        name: as in the records.
        seconds: that it may take.
        run: does it, within some seconds, and records what it finds.
    """

    name: str
    seconds: float
    run: Callable[[Settings, float], None]


LOAD = Phase(load.PHASE, load.FIRST_LAUNCH_SECONDS + load.BUILD_SECONDS, load.run)
FIRST = (
    LOAD,
    Phase(smoke.PHASE, 70, smoke.run),
    Phase("compile", 35, headline.run_compile),
    Phase("headline", 110, headline.run),
    Phase(counters.PHASE, 50, counters.run),
)
SECOND = (
    LOAD,
    Phase("tests", 130, gpu_suite.run),
    Phase("diffusers", 60, gpu_suite.run_diffusers),
    Phase(full_size.PHASE, 100, full_size.run),
    Phase(memcheck.PHASE, 60, memcheck.run),
)
CALLS: dict[str, tuple[tuple[Phase, ...], float]] = {
    "first": (FIRST, 300),
    "second": (SECOND, 400),
    "both": ((*FIRST, *SECOND[1:]), 700),
}
"""Name of a call -> its phases and the seconds for all of them."""


def run_phases(phases: Sequence[Phase], settings: Settings, seconds: float) -> Iterator[Record]:
    """Run phases one after the other and yield how each ended; the report is written anew after each.

    Args:
        phases: what to run.
        settings: of the check.
        seconds: for all of them.
    """
    deadline = time.monotonic() + seconds - PACKING_SECONDS
    for phase in phases:
        begin = time.monotonic()
        before = len(load_records(settings.out / RECORDS))
        left = min(phase.seconds, deadline - begin)
        if left < LEAST_SECONDS:
            end = Record(phase.name, SUMMARY, CUT, "no time was left for it")
        else:
            try:
                phase.run(settings, left)
            except Exception:
                settings.record(Record(phase.name, "the phase itself", FAILED, traceback.format_exc()))
            found = load_records(settings.out / RECORDS)[before:]
            statuses = [record.status for record in found]
            counts = ", ".join(f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses))
            end = Record(phase.name, SUMMARY, worst(statuses), counts, time.monotonic() - begin)
        settings.record(end)
        pack(settings)
        yield end


def pack(settings: Settings) -> None:
    """Write the page of the report and put the logs of all processes beside it; what fails must not end the check."""
    try:
        write(settings)
    except Exception:
        settings.record(Record("report", REPORT, FAILED, traceback.format_exc()))
    with tarfile.open(settings.out / LOGS, "w:gz") as archive:
        for path in sorted((settings.work / "logs").glob("*")):
            archive.add(path, path.name)

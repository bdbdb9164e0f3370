"""`python -m tools.gpu_check`, or `make gpu-check`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks import targets
from tools.gpu_check import report
from tools.gpu_check.stages import FAILED, ROOT, STAGES, WORK, Settings, venv_python

HALF_THE_CORES = max(1, len(os.sched_getaffinity(0)) // 2)


class Device(str, Enum):
    """What is checked."""

    cuda = "cuda"
    cpu = "cpu"


Stage = Enum("Stage", {name: name for name in STAGES}, type=str)  # type: ignore[misc]


def _facts(device: str) -> dict[str, str]:
    """Ask a child: this process must not hold memory of the GPU."""
    command = [sys.executable, "-m", "tools.gpu_check.facts", device]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise SystemExit(result.stderr.strip())
    found: dict[str, str] = json.loads(result.stdout)
    return found


def _emptied(out: Path) -> Path:
    """Make the folder of the report and remove what an earlier run left in it."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "report.json", "results.csv", "clocks.csv", *(f"{name}.log" for name in STAGES)):
        (out / name).unlink(missing_ok=True)
    return out.resolve()


def main(
    device: Annotated[Device, typer.Option(help="cpu is a dry run: the same stages, no GPU.")] = Device.cuda,
    stage: Annotated[list[Stage] | None, typer.Option(help="Only this stage; may be given several times.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report; its old contents are replaced.")] = WORK / "report",
    wheels: Annotated[Path | None, typer.Option(help="Folder of further packages for the tests.")] = None,
    at_once: Annotated[int, typer.Option(help="Test processes side by side.", min=1)] = HALF_THE_CORES,
    repeats: Annotated[int, typer.Option(help="Rounds of the benchmark.", min=3)] = 25,
    seconds: Annotated[float, typer.Option(help="For all stages together; each may take a share of it.")] = 540,
) -> None:
    """Build, test, check memory accesses and measure; stop at the first wrong result; write a report."""
    console = Console(highlight=False, soft_wrap=True)
    facts = _facts(device.value)
    console.print(f"{facts['device']}, torch {facts['torch']}")
    names = [name for name in STAGES if stage is None or name in {chosen.value for chosen in stage}]
    if "build" not in names and not venv_python().exists():
        raise typer.BadParameter("--stage must include build the first time")
    settings = Settings(device.value, facts.get("capability", ""), _emptied(out), wheels, at_once, seconds, repeats)
    command = " ".join(["python -m tools.gpu_check", *sys.argv[1:]])
    begin = time.monotonic()
    done: list[report.StageReport] = []
    verdicts: list[targets.Verdict] = []
    for name in names:
        started = time.monotonic()
        with console.status(name):
            outcome = STAGES[name](replace(settings, seconds_left=seconds - (started - begin)))
        done.append(report.StageReport(name, outcome, time.monotonic() - started))
        verdicts = report.verdicts_of(settings.out, device.value)
        # After each stage: whoever is stopped in the middle keeps what there is.
        report.write(settings.out, facts, done, names[len(done) :], verdicts, command)
        console.print(f"{name}: {outcome.status}, {outcome.summary} ({done[-1].seconds:.0f} s)")
        if outcome.status == FAILED:
            console.print("\n".join(outcome.lines), markup=False)
            break
    for verdict in verdicts:
        console.print(verdict.line)
    console.print(f"report: {settings.out / 'report.md'}")
    raise typer.Exit(int(any(stage.outcome.status == FAILED for stage in done)))


if __name__ == "__main__":
    typer.run(main)

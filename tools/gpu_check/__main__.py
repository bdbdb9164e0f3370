"""`python -m tools.gpu_check`, or `make gpu-check`: checks and measures the kernels on the GPU that is here."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tools.gpu_check import clocks
from tools.gpu_check.phases import CALLS, run_phases
from tools.gpu_check.records import FACTS, FAILED, PASSED, Record
from tools.gpu_check.settings import FILES, PACK, REPORT, ROOT, Settings

WORK = ROOT / "build" / "gpu-check"
FACTS_SECONDS = 60


class Device(str, Enum):
    """What is checked."""

    cuda = "cuda"
    cpu = "cpu"


class Call(str, Enum):
    """What runs: a part of the phases, so that a machine that is lent for minutes is called twice, or all."""

    first = "first"
    second = "second"
    both = "both"


def main(
    call: Annotated[Call, typer.Argument(help="first: what matters most; second: the rest; both.")] = Call.both,
    device: Annotated[Device, typer.Option(help="cpu is a dry run: the same phases, no GPU.")] = Device.cuda,
    phase: Annotated[list[str] | None, typer.Option(help="Only this phase; may be given several times.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the report; an older report in it is replaced.")] = WORK
    / "report",
    pack: Annotated[Path, typer.Option(help="Folder that tools.gpu_check.pack made.")] = PACK,
    seconds: Annotated[float | None, typer.Option(help="For all phases; by default as the call needs.")] = None,
) -> None:
    """Check and measure the kernels; no phase stops another, and each writes what it finds at once.

    Ends with status 1 where something was wrong; what ran out of time is cut, not wrong.
    """
    console = Console(highlight=False, soft_wrap=True)
    phases, limit = CALLS[call.value]
    if unknown := set(phase or ()) - {each.name for each in phases}:
        raise typer.BadParameter(f"--phase must be one of {', '.join(each.name for each in phases)}, got {unknown}")
    # A signal to stop ends the child processes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    begin = time.monotonic()
    settings = Settings(device.value, _emptied(out), _emptied(WORK / "work"), pack)
    (settings.work / "logs").mkdir(exist_ok=True)
    _record_facts(settings)
    chosen = [each for each in phases if not phase or each.name in phase]
    statuses = []
    with clocks.recorded(settings):
        for end in run_phases(chosen, settings, (seconds or limit) - (time.monotonic() - begin)):
            console.print(f"{end.phase}: {end.status}, {end.text} ({end.seconds:.0f} s)")
            statuses.append(end.status)
    console.print((settings.out / REPORT).read_text(), markup=False)
    console.print(f"report: {settings.out}; next: python -m tools.gpu_check.publish {settings.out}")
    raise typer.Exit(int(FAILED in statuses))


def _emptied(folder: Path) -> Path:
    """Make a folder and remove what an earlier run left in it; compiled kernels stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "logs", ignore_errors=True)
    return folder.resolve()


def _record_facts(settings: Settings) -> None:
    """Write down the machine; a child asks, since this process must not hold memory of the GPU."""
    command = [sys.executable, "-m", "tools.gpu_check.facts", settings.device, str(settings.pack)]
    asked = {"command": " ".join(["python -m tools.gpu_check", *sys.argv[1:]])}
    try:
        found = subprocess.run(
            command, cwd=ROOT, env=settings.env(), capture_output=True, text=True, check=True, timeout=FACTS_SECONDS
        )
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.stderr.strip()) from None
    except subprocess.TimeoutExpired:
        settings.record(Record(FACTS, "machine", FAILED, f"no answer within {FACTS_SECONDS} s", values=asked))
        return
    settings.record(Record(FACTS, "machine", PASSED, values={**json.loads(found.stdout), **asked}))


if __name__ == "__main__":
    typer.run(main)

"""`python -m benchmarks`: time the ops on this machine."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import lesa_kernels
from benchmarks import harness, results, targets
from benchmarks.clock import clock_for
from benchmarks.results import RESULTS
from benchmarks.suite import suite

LOG_WIDTH = 120


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Rounds; each takes one sample of every variant.", min=3)] = 15,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given several times.")] = None,
    seconds: Annotated[float, typer.Option(help="Start no further case after this time.")] = float("inf"),
    save: Annotated[bool, typer.Option(help="Append the rows to the results.")] = False,
    out: Annotated[Path, typer.Option(help="The file of the results.")] = RESULTS,
) -> None:
    """Check, then time every op against what a user would run instead."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    clock = clock_for(torch.device(device))
    if clock.device.index is not None:
        torch.cuda.set_device(clock.device)
    origin = results.origin(clock.device)
    entries = [entry for entry in suite(clock.device) if not op or entry.op in op]
    if not entries:
        raise typer.BadParameter(f"--op must name an op of the benchmark, got {', '.join(op or ())}")
    console.print(str(lesa_kernels.status()))
    console.print(f"{origin.device}, torch {origin.torch}, {origin.commit}")
    torch.manual_seed(0)
    begin, measured = time.monotonic(), []
    for number, entry in enumerate(entries):
        if time.monotonic() - begin > seconds:
            console.print(f"{len(entries) - number} cases left out: {seconds:.0f} seconds are over")
            break
        # Recompiling for another case must not make shapes symbolic or meet torch's limit.
        torch.compiler.reset()
        case = entry.make(clock)
        with console.status(case.title):
            rows = harness.measure(case, clock, repeats, origin)
        console.print(results.table(rows))
        measured += rows
        if save:
            results.save(rows, out)
    wanted = targets.targets() if clock.device.type == "cuda" else targets.cpu_targets()
    console.print(targets.table(targets.judge(measured, wanted)))
    if save:
        console.print(f"appended to {out.name}")


if __name__ == "__main__":
    typer.run(main)

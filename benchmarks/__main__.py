"""`python -m benchmarks`: time the ops on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import lesa_kernels
from benchmarks import harness, results, targets
from benchmarks.clock import Clock, clock_for
from benchmarks.compare import ROOT, Worker, checked_out, compare, table
from benchmarks.results import RESULTS
from benchmarks.suite import missing, suite, sweeps

LOG_WIDTH = 120


def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Rounds; each takes one sample of every variant.", min=3)] = 15,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given several times.")] = None,
    seconds: Annotated[float, typer.Option(help="Start no further case after this time.")] = float("inf"),
    sweep: Annotated[bool, typer.Option(help="The cases of the plots instead: elements, inputs, rows.")] = False,
    baseline: Annotated[str | None, typer.Option(help="Compare this commit with another one, in one run.")] = None,
    save: Annotated[bool, typer.Option(help="Append the rows to the results.")] = False,
    out: Annotated[Path, typer.Option(help="The file of the results.")] = RESULTS,
) -> None:
    """Check, then time every op against what a user would run instead.

    With --baseline: against another commit, which is checked out and built below build/.
    """
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    clock = _clock(device)
    origin = results.origin(clock.device)
    for name, given in (("sweep", sweep), ("save", save), ("seconds", seconds < float("inf"))):
        if given and baseline is not None:
            raise typer.BadParameter(f"--{name} and --baseline exclude each other")
    every = sweeps() if sweep else suite(clock.device)
    names = dict.fromkeys(entry.op for entry in every)
    if unknown := [name for name in op or () if name not in names]:
        raise typer.BadParameter(
            f"--op must name an op of the benchmark ({', '.join(names)}), got {', '.join(unknown)}"
        )
    chosen = [number for number, entry in enumerate(every) if not op or entry.op in op]
    lacking = {package for number in chosen if (package := missing(every[number]))}
    for package in sorted(lacking):
        console.print(f"what needs {package} is left out: it is not installed")
    entries = [every[number] for number in chosen if not missing(every[number])]
    console.print(str(lesa_kernels.status()))
    console.print(f"{origin.device}, torch {origin.torch}, {origin.commit}")
    if baseline is not None:
        _compare(console, baseline, device, chosen, repeats)
        return
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
    verdicts = [verdict for verdict in targets.judge(measured, wanted) if verdict.measured is not None]
    if verdicts:
        console.print(targets.table(verdicts))
    if save:
        console.print(
            f"appended to {out.name}; python -m benchmarks.report makes the README's table and the plots of it"
        )


def _clock(device: str) -> Clock:
    try:
        clock = clock_for(torch.device(device))
        if clock.device.type == "cuda":
            torch.cuda.get_device_properties(clock.device)
        if clock.device.index is not None:
            torch.cuda.set_device(clock.device)
    # An AssertionError is what torch raises where it was built without CUDA.
    except (ValueError, RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"--device must be cpu or a GPU that is there, got {device}: {error}") from error
    return clock


def _compare(console: Console, revision: str, device: str, chosen: Sequence[int], repeats: int) -> None:
    try:
        tree = checked_out(revision, torch.device(device).type, console)
        with Worker(tree, device) as base, Worker(ROOT, device) as here:
            for number in chosen:
                with console.status(f"case {number + 1}"):
                    title, rows = compare(base, here, number, repeats)
                console.print(f"{title}: {rows}" if isinstance(rows, str) else table(title, rows))
    except (ValueError, RuntimeError) as error:
        raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)

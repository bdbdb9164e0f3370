"""`python -m benchmarks`: time the ops on this machine."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch._inductor.config
import typer
from rich.console import Console

import lesa_kernels
from benchmarks import harness, results, targets
from benchmarks.clock import Clock, OneSet, clock_for
from benchmarks.compare import ROOT, Worker, checked_out, compare, table
from benchmarks.record import Record
from benchmarks.results import RESULTS
from benchmarks.suite import Entry, headline, missing, suite, sweeps
from lesa_command import interruptible
from lesa_command import run as run_program
from lesa_kernels.backends import libraries

LOG_WIDTH = 120


@interruptible("Interrupted; rows that were saved are whole.")
def main(
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Rounds; each takes one sample of every variant.", min=3)] = 15,
    op: Annotated[list[str] | None, typer.Option(help="Only this op; may be given several times.")] = None,
    seconds: Annotated[float, typer.Option(help="After this time, start no case and drop baselines.")] = float("inf"),
    sweep: Annotated[bool, typer.Option(help="The cases of the plots instead: elements, inputs, rows.")] = False,
    only_headline: Annotated[
        bool, typer.Option("--headline", help="The cases that a GPU is judged by instead, the most important first.")
    ] = False,
    part: Annotated[str, typer.Option(help="Only each n-th case from the i-th on: i/n.")] = "1/1",
    only_compile: Annotated[bool, typer.Option(help="Run each variant once to fill the caches of compilers.")] = False,
    isa: Annotated[
        str | None, typer.Option(help="avx512, avx2 or baseline for our CPU kernels; torch has ATEN_CPU_CAPABILITY.")
    ] = None,
    baseline: Annotated[str | None, typer.Option(help="Compare this commit with another one, in one run.")] = None,
    save: Annotated[bool, typer.Option(help="Append the rows to the results.")] = False,
    out: Annotated[Path, typer.Option(help="The file of the results.")] = RESULTS,
    jsonl: Annotated[Path | None, typer.Option(help="Append rows and what was dropped to this file.")] = None,
) -> None:
    """Check, then time every op against what a user would run instead.

    A variant that is wrong or fails is dropped, with the reason; the status is 1 if one of ours was wrong.

    With --baseline: against another commit, which is checked out and built below build/.
    """
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    clock = _clock(device)
    origin = results.origin(clock.device)
    for name, given in (
        ("sweep", sweep),
        ("headline", only_headline),
        ("save", save),
        ("seconds", seconds < float("inf")),
        ("isa", isa is not None),
    ):
        if given and baseline is not None:
            raise typer.BadParameter(f"--{name} and --baseline exclude each other")
    if isa is not None:
        _choose(isa)
    every = sweeps() if sweep else headline(clock.device) if only_headline else suite(clock.device)
    chosen = _chosen(every, op, part)
    lacking = {package for number in chosen if (package := missing(every[number]))}
    for package in sorted(lacking):
        console.print(f"what needs {package} is left out: it is not installed")
    entries = [every[number] for number in chosen if not missing(every[number])]
    console.print(str(lesa_kernels.status()))
    console.print(f"{origin.device}, torch {origin.torch}, {origin.commit}")
    if baseline is not None:
        _compare(console, baseline, device, chosen, repeats)
        return
    record = Record(console, out if save else None, jsonl)
    if only_compile:
        compile_all(entries, clock.device, record)
        return
    run(entries, clock, repeats, origin, record, seconds)
    wanted = targets.targets() if clock.device.type == "cuda" else targets.cpu_targets()
    verdicts = [verdict for verdict in targets.judge(record.rows, wanted) if verdict.measured is not None]
    if verdicts:
        console.print(targets.table(verdicts))
    if save:
        console.print(
            f"appended to {out.name}; python -m benchmarks.report makes the README's table and the plots of it"
        )
    if any(dropped.wrong and dropped.ours for dropped in record.dropped):
        raise typer.Exit(1)


def run(
    entries: Sequence[Entry], clock: Clock, repeats: int, origin: results.Origin, record: Record, seconds: float
) -> None:
    """Measure one case after the other; what fails is recorded and does not end the rest."""
    torch.manual_seed(0)
    deadline = time.perf_counter() + seconds
    for number, entry in enumerate(entries):
        if time.perf_counter() > deadline:
            record.console.print(f"{len(entries) - number} cases left out: {seconds:.0f} seconds are over")
            for left in entries[number:]:
                record.drop(harness.Dropped(left.op, left.size, "", harness.NO_TIME))
            break
        with harness.dropping(entry.op, entry.size, "", record.drop):
            if clock.device.type == "cuda":
                gc.collect()  # graphs that reference cycles keep alive would be part of the next case
                torch.cuda.empty_cache()
            # Recompiling for another case must not make shapes symbolic or meet torch's limit.
            torch.compiler.reset()
            with record.console.status(f"{entry.op}, {entry.size}"):
                rows = harness.measure(entry.make(clock), clock, repeats, origin, record.drop, deadline)
            record.measured(rows)


def compile_all(entries: Sequence[Entry], device: torch.device, record: Record) -> None:
    """Run each variant once, on one input set, so that what is compiled for it lies in the caches on the disk.

    Several processes may do this at once. What inductor learns by timing while others run must not be kept.
    """
    torch._inductor.config.autotune_local_cache = False
    torch._inductor.config.compile_threads = 1
    for entry in entries:
        with harness.dropping(entry.op, entry.size, "", record.drop):
            torch.compiler.reset()
            case = entry.make(OneSet(device))
            for variant in case.variants:
                begin = time.perf_counter()
                with case.context(), harness.dropping(case.op, case.size, variant.name, record.drop):
                    variant.run(0)
                    content = {"op": case.op, "size": case.size, "variant": variant.name}
                    record.line({**content, "first_call_s": time.perf_counter() - begin})


def _chosen(every: Sequence[Entry], ops: Sequence[str] | None, part: str) -> list[int]:
    """Return the numbers of the cases that --op and --part choose."""
    names = dict.fromkeys(entry.op for entry in every)
    if unknown := [name for name in ops or () if name not in names]:
        raise typer.BadParameter(
            f"--op must name an op of the benchmark ({', '.join(names)}), got {', '.join(unknown)}"
        )
    found = re.fullmatch(r"(\d+)/(\d+)", part)
    number, of = (int(group) for group in found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise typer.BadParameter(f"--part must be i/n with 1 <= i <= n, got {part}")
    return [number for number, entry in enumerate(every) if not ops or entry.op in ops][number - 1 :: of]


def _choose(isa: str) -> None:
    """Choose the instruction set of the CPU kernels."""
    path = libraries.PACKAGE / "_cpu.so"
    if not path.exists() or ctypes.CDLL(str(path)).lesa_cpu_set_isa(isa.encode()):
        raise typer.BadParameter(f"--isa must be one that _cpu was compiled for and this processor runs, got {isa}")


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
    run_program(lambda: partial(typer.run, main))

"""`python -m benchmarks`: time the ops on this machine's CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import lesa_kernels
from benchmarks import harness
from benchmarks.cases import forecast_case, predict_case

RESULTS = Path(__file__).parent / "results.csv"


def main(
    repeats: Annotated[int, typer.Option(help="Rounds; each runs every variant once.", min=3)] = 15,
    save: Annotated[bool, typer.Option(help="Append the rows to benchmarks/results.csv.")] = False,
) -> None:
    """Check, then time predict and forecast against what a user would run instead."""
    console = Console()
    console.print(str(lesa_kernels.status()))
    torch.manual_seed(0)
    command = " ".join(["python -m benchmarks", *sys.argv[1:]])
    makers = [
        lambda: predict_case("FLUX 1024x1024"),
        lambda: forecast_case("FLUX 1024x1024"),
        lambda: predict_case("digits, batch 20", dtype=torch.float32),
        lambda: forecast_case("digits, batch 20", dtype=torch.float32),
    ]
    with torch.inference_mode():
        for make in makers:
            case = make()
            with console.status(f"{case.op} at {case.size}"):
                rows = harness.measure(case, repeats, command)
            console.print(harness.table(rows))
            if save:
                harness.save(rows, RESULTS)
    if save:
        console.print(f"appended to {RESULTS.name}")


if __name__ == "__main__":
    typer.run(main)

"""Runs `lesa bench`: the benchmarks of the checkout that this package was installed from."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import typer

ROOT = Path(__file__).parents[2]


def bench(context: typer.Context) -> None:
    """Time every op against what a user would run instead and against a copy; --help shows the options."""
    if not (ROOT / "benchmarks" / "__main__.py").is_file():
        typer.echo(
            "lesa bench: the benchmarks are part of the repository and not of an installed package; "
            "clone it and run `make bench`",
            err=True,
        )
        raise typer.Exit(2)
    sys.path.insert(0, str(ROOT))
    sys.argv[1:] = context.args
    runpy.run_module("benchmarks", run_name="__main__")

"""`python -m examples.emoji`: fit a learned solver to a model that draws emoji, and compare it with other methods."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lesa_command import loading, run

app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for pictures, figures and predictors.", file_okay=False)] = Path(
        "demo-output"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    samples: Annotated[
        int, typer.Option(help="Samples from unseen noise that the methods are compared on.", min=1, max=400)
    ] = 32,
    runs: Annotated[int, typer.Option(help="Runs that the learned solver is fitted to.", min=1, max=400)] = 16,
) -> None:
    """Fit a learned solver to a small, guided SD3 that draws emoji, and compare it with other methods."""
    console = Console()
    console.print("loading torch and diffusers")
    with loading():
        from examples.emoji.demo import SHOWN_CALLS, DemoConfig, run_demo
        from lesa_kernels.cli.common import check_device, command
    with command("Interrupted; what was written is whole."):
        check_device(device)
        run_demo(DemoConfig(out, device, samples, runs), console)
        console.print(
            "\nNext, for a model of yours:\n\n"
            f"lesa calibrate MODEL --prompts prompts.txt --calls {SHOWN_CALLS} --out my-solver",
            highlight=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    run(lambda: partial(app, prog_name="python -m examples.emoji"))

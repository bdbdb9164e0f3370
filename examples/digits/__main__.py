"""`python -m examples.digits`: train LESA for a model that draws digits, and compare it with other methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(add_completion=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for pictures, figures and predictors.", file_okay=False)] = Path(
        "demo-output"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    samples: Annotated[
        int, typer.Option(help="Samples from unseen noise that the methods are compared on.", min=10)
    ] = 64,
    trajectories: Annotated[int, typer.Option(help="Unaccelerated runs to train on, 20 samples each.", min=1)] = 12,
    seed: Annotated[int, typer.Option(help="Seed of the predictors' first weights.")] = 0,
) -> None:
    """Train LESA for a small FLUX that draws digits, and compare it with other methods on unseen noise."""
    console = Console()
    with console.status("loading torch and diffusers"):
        from examples.digits.demo import DemoConfig, run_demo
        from lesa_kernels.cli.common import check_device
    check_device(device)
    run_demo(DemoConfig(out, device, samples, trajectories=trajectories, seed=seed), console)


if __name__ == "__main__":
    app(prog_name="python -m examples.digits")

"""The command `lesa`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lesa_kernels.backends import status as kernel_status
from lesa_kernels.cli.bench import bench
from lesa_kernels.cli.checks import check_device, check_modules
from lesa_kernels.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Forecast a diffusion transformer's features.")
app.command()(train)
# Its options are those of the benchmarks, which are not part of the package.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)(bench)


@app.command()
def status() -> None:
    """Tell which kernel serves which device, and why."""
    typer.echo(str(kernel_status()))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, figures and predictors.", file_okay=False)] = Path(
        "demo-output"
    ),
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    samples: Annotated[int, typer.Option(help="Unseen samples to compare on.", min=10)] = 64,
    trajectories: Annotated[int, typer.Option(help="Unaccelerated runs to train on.", min=1)] = 12,
    seed: Annotated[int, typer.Option(help="Of the predictors' first weights.")] = 0,
) -> None:
    """Train LESA for a small FLUX that draws digits, and compare it with its rivals on unseen noise."""
    check_modules("the demo", "diffusers", "matplotlib")
    check_device(device)
    from lesa_kernels.demo.run import DemoConfig, run_demo

    run_demo(DemoConfig(out, device, samples, trajectories=trajectories, seed=seed), Console())

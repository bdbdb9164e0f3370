"""Puts the commands of `lesa` together."""

from __future__ import annotations

import typer

from lesa_kernels.backends import status as kernel_status
from lesa_kernels.cli.bench import bench
from lesa_kernels.cli.calibrate import calibrate
from lesa_kernels.cli.common import command
from lesa_kernels.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Forecast a diffusion transformer's features.")
app.command()(calibrate)
app.command()(train)
# Its options are those of the benchmarks, which are not part of the package.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)(bench)


@app.command()
def status() -> None:
    """Show which kernel serves which device, and why."""
    with command("Interrupted."):
        typer.echo(str(kernel_status()))

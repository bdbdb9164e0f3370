"""`python -m benchmarks.quality.training_free`: compare the forecasters that need no training, uniform in sigma."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.quality.forecasters import OWN_SCHEDULES, TRAINING_FREE
from benchmarks.quality.methods import UNIFORM, Sampled
from benchmarks.quality.setting import DATA, Setting
from examples.digits.comparison import psnr
from lesa_kernels.machine import one_thread
from lesa_kernels.schedule import Schedule

OWN = "its own"
LOG_WIDTH = 120


def sampled_training_free(setting: Setting, calls: int) -> Iterator[Sampled]:
    """Yield the images of every forecaster that needs no training, uniform in sigma and by its own rule if it has one.

    Args:
        setting: the model and its noise.
        calls: of the blocks.
    """
    uniform = Schedule.uniform_in_sigma(setting.sigmas, calls)
    for name, predictor in TRAINING_FREE.items():
        schedules = {UNIFORM: uniform}
        if name in OWN_SCHEDULES:
            schedules[OWN] = OWN_SCHEDULES[name](setting.steps, calls)
        for schedule_name, schedule in schedules.items():
            images, full_steps = setting.images(predictor, schedule)
            yield Sampled(name, schedule_name, full_steps, images)


@one_thread()
def main(
    data: Annotated[list[str] | None, typer.Option(help="Only this data set.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Models of these seeds, as far as they are trained.")] = None,
    calls: Annotated[list[int] | None, typer.Option(help="Only at so many calls; else 10, 8, 6.")] = None,
    models: Annotated[Path, typer.Option(help="Folder of the trained models.")] = Path("build/models"),
) -> None:
    """Print dB against the plain run, a mean over the trained models, best first."""
    console = Console(width=LOG_WIDTH)
    counts = calls or [10, 8, 6]
    for name in data or DATA:
        found: dict[tuple[str, str], dict[int, list[float]]] = {}
        folders = [DATA[name].folder(models, number) for number in seed or (0, 1, 2)]
        trained = [folder for folder in folders if (folder / "config.json").is_file()]
        for folder in trained:
            setting = Setting.load(DATA[name], folder)
            for count in counts:
                for each in sampled_training_free(setting, count):
                    own = found.setdefault((each.method, each.schedule), {number: [] for number in counts})
                    own[count].append(psnr(each.images, setting.reference)[0])
        console.print(table(found, f"{name}, {len(trained)} trained models"))


def table(found: dict[tuple[str, str], dict[int, list[float]]], title: str) -> Table:
    """Lay out means over models of each method and schedule, the best mean over the numbers of calls first."""
    means = {key: [statistics.mean(values) for values in counts.values()] for key, counts in found.items()}
    heads = [f"{count} calls" for count in next(iter(found.values()), {})]
    out = Table(title=title, box=box.SIMPLE_HEAD)
    for head in ("method", "full steps", *heads, "mean"):
        out.add_column(head, justify="left" if head in ("method", "full steps") else "right")
    for key in sorted(means, key=lambda key: -statistics.mean(means[key])):
        out.add_row(*key, *(f"{value:.2f}" for value in (*means[key], statistics.mean(means[key]))))
    return out


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    typer.run(main)

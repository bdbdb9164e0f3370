"""`python -m benchmarks.quality.training_free`: compare the forecasters that need no training, uniform in sigma."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Protocol

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.quality.forecasters import OWN_SCHEDULES, TRAINING_FREE
from benchmarks.quality.methods import UNIFORM, Sampled
from benchmarks.quality.setting import DATA, UNSEEN_NOISE, Setting
from examples.digits.comparison import psnr
from examples.emoji import emoji_model
from examples.emoji.emoji_pipeline import EmojiPipeline
from lesa_kernels.integrations import enabled
from lesa_kernels.machine import one_thread
from lesa_kernels.predictors import Predictor
from lesa_kernels.schedule import Schedule

EMOJI = "emoji"
OWN = "its own"
LOG_WIDTH = 120
_SAMPLES = 32


class Compared(Protocol):
    """What forecasters are compared on; `Setting` is one."""

    steps: int

    @property
    def sigmas(self) -> Sequence[float]:
        """The S+1 noise levels."""

    @property
    def reference(self) -> Tensor:
        """The unseen samples with all steps in full, [B, H, W]."""

    def images(self, predictor: Predictor, schedule: Schedule) -> tuple[Tensor, tuple[int, ...]]:
        """Sample with forecasts; return images and the steps that were full."""


class GuidedEmoji:
    """The guided emoji model as `enable` serves it.

    Args:
        samples: how many; each has a name of its own for prompt.
        steps: S.
    """

    def __init__(self, samples: int = _SAMPLES, steps: int = 50) -> None:
        self.steps = steps
        self.pipe = EmojiPipeline.load()
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.scheduler.set_timesteps(steps)
        self.sigmas: Sequence[float] = self.pipe.scheduler.sigmas.tolist()
        generator = torch.Generator().manual_seed(UNSEEN_NOISE)
        chosen = torch.randperm(len(emoji_model.names()), generator=generator)[:samples]
        self.prompts = [emoji_model.names()[index] for index in chosen.tolist()]
        self.noise = torch.randn(
            samples, emoji_model.CHANNELS, emoji_model.IMAGE_SIZE, emoji_model.IMAGE_SIZE, generator=generator
        )

    def _sample(self) -> Tensor:
        """Return images, the three colours one below the other, [B, 3 H, W]."""
        found = self.pipe(self.prompts, num_inference_steps=self.steps, latents=self.noise, output_type="pt")
        images: Tensor = found.images.flatten(1, 2)
        return images

    @cached_property
    def reference(self) -> Tensor:
        """See `Compared.reference`."""
        return self._sample()

    def images(self, predictor: Predictor, schedule: Schedule) -> tuple[Tensor, tuple[int, ...]]:
        """See `Compared.images`."""
        with enabled(self.pipe, predictor, schedule):
            return self._sample(), predictor.plan(self.sigmas, schedule).full_steps


def sampled_training_free(setting: Compared, calls: int) -> Iterator[Sampled]:
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
    for name in data or (*DATA, EMOJI):
        found: dict[tuple[str, str], dict[int, list[float]]] = {}
        settings = list(_settings(name, seed or (0, 1, 2), models))
        for setting in settings:
            for count in counts:
                for each in sampled_training_free(setting, count):
                    own = found.setdefault((each.method, each.schedule), {number: [] for number in counts})
                    own[count].append(psnr(each.images, setting.reference)[0])
        console.print(table(found, f"{name}, {len(settings)} trained models"))


def _settings(name: str, seeds: Sequence[int], models: Path) -> Iterator[Compared]:
    """Yield the settings of the models that are there."""
    if name == EMOJI:
        yield GuidedEmoji()
        return
    for folder in (DATA[name].folder(models, seed) for seed in seeds):
        if (folder / "config.json").is_file():
            yield Setting.load(DATA[name], folder)


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

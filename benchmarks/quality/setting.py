"""Provides what methods are compared on: trained models in their pipelines, runs to learn from, and unseen noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from examples.digits import model as digits
from examples.digits.pipeline import DigitsPipeline
from examples.digits.solvers import solve as solve_digits
from examples.digits.train_model import Data as Digits
from examples.digits.train_model import main as train_digits
from examples.emoji import emoji_model as emoji
from examples.emoji.emoji_pipeline import EmojiPipeline
from examples.emoji.train_emoji import main as train_emoji
from lesa_kernels.integrations import PipelineSource, enabled, recorded, summary
from lesa_kernels.integrations.state import Predictors
from lesa_kernels.predictors import Predictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.trajectories import RecordedSource

STEPS = 50
CONVERGED_STEPS = 200
UNSEEN_NOISE, KNOWN_NOISE = 0, 1_000_000
"""Seeds of the first sample: what is compared on must never have been learned from."""


@dataclass(frozen=True)
class Data:
    """A data set with models for it.

    Args:
        name: also in the names of folders and rows.
        samples: unseen ones to compare on.
        load: folder of a trained model -> its pipeline.
        train: (folder, seed): trains a model.
        prompt: number of a sample -> its prompt; even numbers are compared on, odd ones learned from.
        shape: pipeline -> that of one sample's noise.
        solve: (pipeline, noise, prompts, noise levels, order) -> images by Euler or Adams-Bashforth 2.
        committed: folder of the model of seed 0, where it comes with the repository.
    """

    name: str
    samples: int
    load: Callable[[Path], Any]
    train: Callable[[Path, int], None]
    prompt: Callable[[int], str]
    shape: Callable[[Any], tuple[int, ...]]
    solve: Callable[[Any, Tensor, Sequence[str], Sequence[float], Literal[1, 2]], Tensor]
    committed: Path | None = None

    def folder(self, models: Path, seed: int) -> Path:
        """Return where the model of a seed lies."""
        return self.committed if self.committed is not None and seed == 0 else models / f"{self.name}-{seed}"


def _digits_pipeline(folder: Path) -> DigitsPipeline:
    return DigitsPipeline(digits.load_model(folder=folder), digits.scheduler())


def _digits_shape(pipe: Any) -> tuple[int, ...]:
    design = digits.design_of(pipe.transformer)
    return design.num_tokens, design.token_size


def _solve_digits(
    pipe: Any, noise: Tensor, prompts: Sequence[str], sigmas: Sequence[float], order: Literal[1, 2]
) -> Tensor:
    return solve_digits(pipe.transformer, noise, torch.tensor([int(prompt) for prompt in prompts]), sigmas, order)


def _digits(name: Digits, samples: int, iterations: int, committed: Path | None) -> Data:
    return Data(
        name.value,
        samples,
        load=_digits_pipeline,
        train=lambda folder, seed: train_digits(folder, iterations, 32, seed, name, "cpu"),
        prompt=lambda number: str(number // 2 % digits.NUM_CLASSES),
        shape=_digits_shape,
        solve=_solve_digits,
        committed=committed,
    )


DATA = {
    "digits": _digits(Digits.digits, 128, 3000, None),
    "mnist": _digits(Digits.mnist, 64, 6000, digits.WEIGHTS),
    "emoji": Data(
        "emoji",
        samples=64,
        load=lambda folder: EmojiPipeline(emoji.load_model(folder=folder), emoji.scheduler()),
        train=lambda folder, seed: train_emoji(out=folder, seed=seed),
        # Neighbors in the list are alike; a large odd stride meets each name once.
        prompt=lambda number: emoji.names()[number * 389 % len(emoji.names())],
        shape=lambda pipe: (emoji.CHANNELS, emoji.IMAGE_SIZE, emoji.IMAGE_SIZE),
        solve=lambda pipe, noise, prompts, sigmas, order: emoji.solve(pipe.transformer, noise, prompts, sigmas, order),
        committed=emoji.WEIGHTS,
    ),
}


class Samples:
    """Some samples of a model: their prompts and noise, and what becomes of them.

    Args:
        data: where the model comes from.
        pipe: its pipeline.
        count: how many samples.
        first_seed: of the noise of the first; the others follow.
        offset: 0 for prompts to compare on, 1 for prompts to learn from.
        steps: S.
    """

    def __init__(self, data: Data, pipe: Any, count: int, first_seed: int, offset: int, steps: int = STEPS) -> None:
        self.pipe = pipe
        self.steps = steps
        self.prompts = [data.prompt(2 * number + offset) for number in range(count)]
        self._data = data
        self._first_seed = first_seed
        self._offset = offset
        self._first: dict[int, Samples] = {}
        pipe.set_progress_bar_config(disable=True)

    def __len__(self) -> int:
        return len(self.prompts)

    def first(self, count: int) -> Samples:
        """Return the first of the samples alone, or all of them; the same object for the same count."""
        count = min(count, len(self))
        if count not in self._first:
            self._first[count] = Samples(self._data, self.pipe, count, self._first_seed, self._offset, self.steps)
        return self._first[count]

    def source(self) -> PipelineSource:
        """Return the samples as runs to learn from."""
        return PipelineSource(self.pipe, self.prompts, steps=self.steps, seed=self._first_seed)

    @cached_property
    def sigmas(self) -> tuple[float, ...]:
        """The S+1 noise levels."""
        return self.source().sigmas

    @cached_property
    def noise(self) -> Tensor:
        """What the samples begin with, [B, ...]."""
        seeds = range(self._first_seed, self._first_seed + len(self))
        shape = (1, *self._data.shape(self.pipe))
        return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    @cached_property
    def plain(self) -> Tensor:
        """Images with all steps in full, [B, ...] from -1 to 1."""
        return self.sampled()

    @cached_property
    def converged(self) -> Tensor:
        """Images by many steps of a second-order solver."""
        fine = PipelineSource(self.pipe, self.prompts[:1], steps=CONVERGED_STEPS).sigmas
        return self._data.solve(self.pipe, self.noise, self.prompts, fine, 2)

    @cached_property
    def features(self) -> list[Tensor]:
        """The features of the samples with all steps in full, in one call each, [B or 2 B, ...]."""
        with recorded(self.pipe) as features:
            self.sampled()
        return features

    @property
    def recorded(self) -> RecordedSource:
        """The same features as runs to train on, two samples each where one call holds one sample."""
        parts = zip(*(feature.split(2) for feature in self.features), strict=True)
        return RecordedSource([list(part) for part in parts], self.sigmas)

    def forecast(self, predictor: Predictors, schedule: Schedule) -> tuple[Tensor, tuple[int, ...]]:
        """Return images with forecasts, as users get them, and the steps that were full.

        Raises:
            RuntimeError: when the run went on without forecasts.
        """
        with enabled(self.pipe, predictor, schedule):
            images = self.sampled()
            refused = summary(self.pipe).refused
        if refused is not None:
            raise RuntimeError(f"the run was sampled without forecasts: {refused}")
        first = predictor if isinstance(predictor, Predictor) else next(iter(predictor.values()))
        return images, first.plan(self.sigmas, schedule).full_steps

    def solved(self, schedule: Schedule, order: Literal[1, 2]) -> Tensor:
        """Return images by a solver that takes the full steps only."""
        levels = [self.sigmas[step] for step in schedule.full_steps] + [self.sigmas[-1]]
        return self._data.solve(self.pipe, self.noise, self.prompts, levels, order)

    def sampled(self) -> Tensor:
        """Sample, with whatever is enabled."""
        generators = [torch.Generator().manual_seed(self._first_seed + number) for number in range(len(self))]
        images: Tensor = self.pipe(
            prompt=self.prompts, num_inference_steps=self.steps, generator=generators, output_type="latent"
        ).images
        return images


@dataclass(frozen=True)
class Setting:
    """A trained model: samples to compare on, and others to learn from."""

    unseen: Samples
    known: Samples

    @classmethod
    def load(cls, data: Data, folder: Path, runs: int) -> Setting:
        """Make the setting of a trained model, with so many runs to learn from."""
        pipe = data.load(folder)
        return cls(Samples(data, pipe, data.samples, UNSEEN_NOISE, 0), Samples(data, pipe, runs, KNOWN_NOISE, 1))

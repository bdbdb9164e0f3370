"""Provides what methods are compared on: a trained model, runs to learn from, unseen noise and its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from examples.digits.model import (
    MNIST,
    NUM_CLASSES,
    SMALL_DIGITS,
    WEIGHTS,
    Design,
    conditioning,
    initial_noise,
    load_model,
    scheduler,
    set_up,
    unpatchify,
)
from examples.digits.solvers import solve
from lesa_kernels.integrations import recorded
from lesa_kernels.predictors import Predictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.training.policies import PlanPolicy, reference_run
from lesa_kernels.trajectories import LoopSource, ModelCall, RecordedSource, StepPolicy, watch

STEPS = 50
CONVERGED_STEPS = 200
# The noise to learn from and the noise to compare on must differ.
TRAINING_NOISE, UNSEEN_NOISE = 1_000, 0


@dataclass(frozen=True)
class Data:
    """A data set with models for it.

    Args:
        name: also in the names of folders and rows.
        design: sizes of its model.
        iterations: of the model's training.
        batch: images in each of them.
        samples: unseen ones to compare on.
    """

    name: str
    design: Design
    iterations: int
    batch: int
    samples: int

    def folder(self, cache: Path, seed: int) -> Path:
        """Return where the model of a seed lies: in the cache, but for the one that comes with the package."""
        return WEIGHTS if self.design is MNIST and seed == 0 else cache / f"{self.name}-{seed}"


DATA = {
    "digits": Data("digits", SMALL_DIGITS, iterations=3000, batch=32, samples=128),
    "mnist": Data("mnist", MNIST, iterations=6000, batch=32, samples=64),
}


class Setting:
    """A model and its samples.

    Args:
        model: in evaluation mode.
        design: its sizes.
        learn: how many runs there are to learn from.
        samples: how many unseen ones to compare on.
        steps: S.
    """

    def __init__(
        self, model: FluxTransformer2DModel, design: Design, learn: int = 32, samples: int = 128, steps: int = STEPS
    ) -> None:
        self.model = model
        self.design = design
        self.steps = steps
        self.sigmas = tuple(float(sigma) for sigma in set_up(scheduler(), steps))
        self.noise = initial_noise(samples, UNSEEN_NOISE, design=design)
        self.labels = torch.arange(samples) % NUM_CLASSES
        self.learnt_from = self.learning(learn)

    @classmethod
    def load(cls, data: Data, folder: Path) -> Setting:
        """Make the setting of a trained model."""
        return cls(load_model(folder=folder), data.design, samples=data.samples)

    def learning(self, runs: int) -> LoopSource:
        """Return so many runs to learn from."""
        noise = initial_noise(runs, TRAINING_NOISE, design=self.design)
        return self.source(noise, torch.arange(runs) % NUM_CLASSES)

    def source(self, noise: Tensor, labels: Tensor) -> LoopSource:
        """Return the Euler runs from some noise [B, T, C], one for each sample."""
        return LoopSource(partial(self._loop, noise, labels), len(noise), self.sigmas)

    def _loop(self, noise: Tensor, labels: Tensor, runs: Sequence[int], policy: StepPolicy) -> None:
        """Sample some runs by Euler's steps; see `LoopSource`."""
        chosen = list(runs)
        tokens, fixed = noise[chosen], conditioning(labels[chosen], design=self.design)
        for step in range(self.steps):
            time = torch.full((len(chosen),), self.sigmas[step])
            modulation = self.model.time_text_embed(time * 1000, fixed["pooled_projections"])

            def blocks(tokens: Tensor = tokens, time: Tensor = time) -> Tensor:
                with recorded(self.model) as features:
                    self.model(hidden_states=tokens, timestep=time, **fixed, return_dict=False)
                return features[0]

            def tail(feature: Tensor, modulation: Tensor = modulation) -> Tensor:
                output: Tensor = self.model.proj_out(self.model.norm_out(feature, modulation))
                return output

            velocity = policy(ModelCall(step, blocks, tail, tokens))
            if velocity is None:
                raise RuntimeError("the policy must answer with an output")
            tokens = tokens + (self.sigmas[step + 1] - self.sigmas[step]) * velocity

    @cached_property
    def features(self) -> list[Tensor]:
        """The features of the runs to learn from, [runs, T, width] of each step."""
        kept: list[Tensor] = []

        def policy(call: ModelCall) -> Tensor | None:
            feature, output = watch(call)
            kept.append(feature)
            return output

        with torch.no_grad():
            self.learnt_from.run(range(len(self.learnt_from)), policy)
        return kept

    @cached_property
    def trajectories(self) -> RecordedSource:
        """The same, two samples a run."""
        parts = zip(*(feature.split(2) for feature in self.features), strict=True)
        return RecordedSource([list(part) for part in parts], self.sigmas)

    @cached_property
    def reference(self) -> Tensor:
        """The unseen samples with all steps in full, images [B, size, size]."""
        source = self.source(self.noise, self.labels)
        latents = reference_run(source, range(len(source)), [self.steps]).latents[self.steps]
        return unpatchify(latents, self.design)

    @cached_property
    def converged(self) -> Tensor:
        """The unseen samples by many steps of a second-order solver."""
        return solve(self.model, self.noise, self.labels, set_up(scheduler(), CONVERGED_STEPS).tolist(), order=2)

    @torch.no_grad()
    def images(self, predictor: Predictor, schedule: Schedule) -> tuple[Tensor, tuple[int, ...]]:
        """Sample the unseen noise with forecasts; return images and the steps that were full."""
        plan = predictor.plan(self.sigmas, schedule)
        policy = PlanPolicy(plan)
        self.source(self.noise, self.labels).run(range(len(self.noise)), policy)
        if policy.final is None:
            raise RuntimeError("the run did not reach its end")
        return unpatchify(policy.final, self.design), plan.full_steps

    def solved(self, schedule: Schedule, order: int) -> Tensor:
        """Sample the unseen noise by a solver that takes the full steps only."""
        levels = [self.sigmas[step] for step in schedule.full_steps] + [self.sigmas[-1]]
        return solve(self.model, self.noise, self.labels, levels, 2 if order == 2 else 1)

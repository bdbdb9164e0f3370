"""Defines the hyper-parameters of a training, the order of its batches, and its result."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lesa_kernels.checks import check_float, check_int

Phase = Literal["teacher forcing", "closed loop"]


@dataclass(frozen=True)
class TrainingConfig:
    """Hyper-parameters; the defaults are the published ones (arXiv 2602.20497).

    Args:
        teacher_forcing_epochs: passes over the runs with true features as history.
        closed_loop_epochs: passes with the predictor's own forecasts as history, as at inference.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        clip_norm: largest norm of a gradient.
        decay: "step" multiplies the rate by `decay_factor` every `decay_every` updates; "cosine" lowers it to
            `learning_rate * decay_factor` over a phase.
        decay_every: updates between two steps of the decay.
        decay_factor: see `decay`.
        restart_each_phase: begin each phase with a fresh optimizer and rate. Published: one for both, so that with
            many prompts the rate of phase 2 is almost nothing.
        batch_size: runs sampled as one batch, one update a forecast step for all of them; processes share them.
        shuffle: sample the runs of each epoch in a random order. Published: as they come.
        seed: of that order.

    Raises:
        TypeError: for something else than a number.
        ValueError: for a number out of range.
    """

    teacher_forcing_epochs: int = 1
    closed_loop_epochs: int = 2
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    decay: Literal["step", "cosine"] = "step"
    decay_every: int = 500
    decay_factor: float = 0.5
    restart_each_phase: bool = False
    batch_size: int = 1
    shuffle: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("teacher_forcing_epochs", 0),
            ("closed_loop_epochs", 0),
            ("decay_every", 1),
            ("batch_size", 1),
        ):
            object.__setattr__(self, name, check_int(name, getattr(self, name), least))
        check_float("weight_decay", self.weight_decay, least=0)
        for name in ("learning_rate", "decay_factor"):
            check_float(name, getattr(self, name), above=0)
        # Infinite: gradients are not clipped.
        check_float("clip_norm", self.clip_norm, above=0, finite=False)
        if self.decay not in ("step", "cosine"):
            raise ValueError(f'decay must be "step" or "cosine", got {self.decay!r}')

    @classmethod
    def published(cls) -> TrainingConfig:
        """The published settings, with float32 parameters."""
        return cls()

    @classmethod
    def tuned(cls) -> TrainingConfig:
        """Return a rate that float32 parameters can use, afresh for each phase, and twice the epochs."""
        return cls(2, 4, learning_rate=1e-3, decay="cosine", decay_factor=0.1, restart_each_phase=True)

    def rate(self, updates: int, of_phase: int, phase_length: int) -> float:
        """Return the learning rate of an update.

        Args:
            updates: updates before it since the optimizer was fresh.
            of_phase: updates before it in its phase.
            phase_length: updates of the whole phase.
        """
        if self.decay == "step":
            return float(self.learning_rate * self.decay_factor ** (updates // self.decay_every))
        fallen = 0.5 - 0.5 * math.cos(math.pi * of_phase / max(phase_length, 1))
        return self.learning_rate * (1 - fallen * (1 - self.decay_factor))


@dataclass(frozen=True)
class Batch:
    """Runs sampled as one batch.

    Args:
        phase: of the training.
        epoch: of the phase.
        runs: their numbers in the source.
        number: batches before it in the phase.
        phase_length: batches of the whole phase.
    """

    phase: Phase
    epoch: int
    runs: tuple[int, ...]
    number: int
    phase_length: int

    def __str__(self) -> str:
        """Name it for messages."""
        return f"{self.phase} phase, epoch {self.epoch}, run {' '.join(map(str, self.runs))}"


def all_batches(config: TrainingConfig, num_runs: int) -> list[Batch]:
    """Return all batches of a training in their order, which depends on the arguments alone."""
    batches = []
    phases: list[tuple[Phase, int]] = [
        ("teacher forcing", config.teacher_forcing_epochs),
        ("closed loop", config.closed_loop_epochs),
    ]
    of_epoch = math.ceil(num_runs / config.batch_size)
    for phase, epochs in phases:
        for epoch in range(epochs):
            order = list(range(num_runs))
            if config.shuffle:
                random.Random(f"{config.seed}, {phase}, {epoch}").shuffle(order)
            for index in range(of_epoch):
                runs = tuple(order[index * config.batch_size : (index + 1) * config.batch_size])
                batches.append(Batch(phase, epoch, runs, epoch * of_epoch + index, epochs * of_epoch))
    return batches


@dataclass
class TrainingResult:
    """Losses and times of a training.

    Args:
        losses: mean L1 loss over the forecasts of a batch of runs, by phase, in order.
        seconds: duration, without interruptions.
        updates: updates by the optimizer.
    """

    losses: dict[Phase, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    updates: int = 0


def losses_by_phase(batches: Sequence[Batch], losses: Sequence[float]) -> dict[Phase, list[float]]:
    """Sort the losses of the first batches by phase; a phase that has not begun has none."""
    found: dict[Phase, list[float]] = {"teacher forcing": [], "closed loop": []}
    for batch, loss in zip(batches, losses, strict=False):
        found[batch.phase].append(loss)
    return found

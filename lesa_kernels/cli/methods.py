"""What `lesa train --method` can do: each learns from a source and leaves predictors in a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from lesa_kernels.predictors import LesaPredictor
from lesa_kernels.predictors.lesa import PUBLISHED_STAGES
from lesa_kernels.schedule import Schedule
from lesa_kernels.sources import Source
from lesa_kernels.training import TrainingConfig, train

# The first stage reads four features, so that many full steps come first.
_WARMUP = 4
# Published for Qwen-Image, whose guidance has branches.
_STAGES_OF_BRANCHES = ((0.9, 4), (0.4, 8), (0.0, 8))


class Method(str, Enum):
    """How to learn."""

    tuned = "tuned"
    published = "published"


@dataclass(frozen=True)
class Job:
    """What there is to learn.

    Args:
        source: the runs.
        branches: of the guidance; each gets a predictor.
        interval: of the published rule.
        calls: or: how many full steps, uniform in sigma.
        out: folder for all that is written.
        device: where the predictors are trained.
        batch: runs at once.
        epochs: with true history and in closed loop, None for those of the method.
        learning_rate: None for that of the method.
        seed: of the predictors' first weights.
        tensorboard: write its scalars too.
        console: where progress goes; a quiet one shows none.
    """

    source: Source
    branches: tuple[str, ...]
    out: Path
    device: str
    interval: int = 7
    calls: int | None = None
    batch: int = 1
    epochs: tuple[int, int] | None = None
    learning_rate: float | None = None
    seed: int = 0
    tensorboard: bool = False
    console: Console = field(default_factory=Console)

    def schedule(self, warmup: int) -> Schedule:
        """Return the schedule that was asked for; where calls were, so many full steps come first."""
        if self.calls is None:
            return Schedule.interval(len(self.source.sigmas) - 1, self.interval)
        return Schedule.uniform_in_sigma(self.source.sigmas, self.calls, min(warmup, self.calls))


def _train_lesa(preset: Callable[[], TrainingConfig], job: Job) -> str:
    """Train LESA's own predictor, one a branch."""
    config = replace(preset(), batch_size=job.batch, seed=job.seed)
    if job.epochs is not None:
        config = replace(config, guided_epochs=job.epochs[0], closed_loop_epochs=job.epochs[1])
    if job.learning_rate is not None:
        config = replace(config, learning_rate=job.learning_rate)
    torch.manual_seed(job.seed)
    stages = PUBLISHED_STAGES if len(job.branches) == 1 else _STAGES_OF_BRANCHES
    steps = len(job.source.sigmas) - 1
    predictors = {branch: LesaPredictor(steps, stages).to(job.device) for branch in job.branches}
    wanted = job.schedule(_WARMUP)
    schedule = Schedule(steps, predictors[job.branches[0]].plan(job.source.sigmas, wanted).full_steps)
    job.console.print(_placement(schedule, wanted), soft_wrap=True)
    result = train(
        predictors,
        job.source,
        schedule,
        config,
        out=job.out,
        progress=not job.console.quiet,
        description="LESA",
        tensorboard=job.tensorboard,
    )
    losses = [
        f"{phase}: loss {values[0]:.4g} in the first batch, {values[-1]:.4g} in the last"
        for phase, values in result.losses.items()
        if values
    ]
    return "\n".join([f"{result.updates} updates in {result.seconds:.0f} s", *losses])


def _placement(schedule: Schedule, wanted: Schedule) -> str:
    """Say where the blocks will run."""
    full, speedup = " ".join(map(str, schedule.full_steps)), schedule.speedup
    text = f"blocks run on {len(schedule.full_steps)} steps, {speedup:.2f} x fewer: {full}"
    more = len(schedule.full_steps) - len(wanted.full_steps)
    return text if not more else f"{text}; {more} more than asked for, as the predictor's windows are not full before"


METHODS: dict[Method, Callable[[Job], str]] = {
    Method.tuned: partial(_train_lesa, TrainingConfig.tuned),
    Method.published: partial(_train_lesa, TrainingConfig.published),
}
"""Learns, writes the predictors to the job's folder (several: in folders of their branches), returns what to tell."""

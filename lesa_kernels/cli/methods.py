"""What `lesa train --method` can do: each learns from a source and leaves predictors in a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from lesa_kernels.integrations import default_schedule
from lesa_kernels.predictors import LesaPredictor, LinearPredictor, TaylorSeer
from lesa_kernels.predictors.lesa import PUBLISHED_STAGES
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import (
    Judge,
    TrainingConfig,
    checkpoint,
    fit_lesa,
    fit_through_tail,
    plan_for_budget,
    search_placement,
    segment_stages,
    train,
)
from lesa_kernels.training.files import reserved
from lesa_kernels.training.placement import MakePredictor
from lesa_kernels.training.reports import save_predictors
from lesa_kernels.trajectories import ONLY_BRANCH, TrajectorySource

_INTERVAL = 7
# Placements that are tried for a budget if nothing else is said.
_SEARCH = 40
# Of a fit that is only to tell how good a placement is.
_ROUNDS_TO_TRY = 2
# The first stage reads four features, so that many full steps come first.
_WARMUP = 4
# Of the KANs where every segment has an expert of its own.
_HIDDEN = 32
# Published for Qwen-Image, whose guidance has branches.
_STAGES_OF_BRANCHES = ((0.9, 4), (0.4, 8), (0.0, 8))


class Method(str, Enum):
    """How to learn."""

    tuned = "tuned"
    published = "published"
    tail = "tail"
    lesa_tail = "lesa-tail"


@dataclass(frozen=True)
class Job:
    """What there is to learn.

    Args:
        source: the runs.
        branches: of the guidance; each gets a predictor.
        interval: of the published rule.
        calls: or: how many full steps, uniform in sigma.
        seconds: or: as many as a batch of runs may last.
        decibels: or: as few as reach this bound, see `lesa_kernels.training.Judged`.
        search: how many placements to try for the full steps with TaylorSeer; 0 takes them as they are.
        refine: how many to try from there on with a fit for each.
        out: folder for all that is written.
        device: where the predictors are trained.
        batch: runs at once.
        epochs: with true history and in closed loop, None for those of the method.
        learning_rate: None for that of the method.
        seed: of the predictors' first weights.
        tensorboard: write its scalars too.
        console: where progress goes; a quiet one shows none.
    """

    source: TrajectorySource
    branches: tuple[str, ...]
    out: Path
    device: str
    interval: int | None = None
    calls: int | None = None
    seconds: float | None = None
    decibels: float | None = None
    search: int = 0
    refine: int = 0
    batch: int = 1
    epochs: tuple[int, int] | None = None
    learning_rate: float | None = None
    seed: int = 0
    tensorboard: bool = False
    console: Console = field(default_factory=Console)

    @property
    def seeks(self) -> bool:
        """Whether the full steps are to be found by sampling."""
        return self.search > 0 or self.refine > 0 or self.seconds is not None or self.decibels is not None

    def schedule(self, warmup: int) -> Schedule:
        """Return the schedule that was asked for; where calls were, so many full steps come first."""
        if self.calls is None:
            return Schedule.interval(len(self.source.sigmas) - 1, self.interval or _INTERVAL)
        return Schedule.uniform_in_sigma(self.source.sigmas, self.calls, min(warmup, self.calls))


def _train_lesa(preset: Callable[[], TrainingConfig], job: Job) -> str:
    """Train LESA's own predictor, one a branch."""
    if job.seeks:
        raise ValueError(
            "--search, --refine, --seconds and --decibels are for the methods that fit: tail and lesa-tail"
        )
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


def _found_schedule(job: Job, fit: MakePredictor) -> Schedule:
    """Return where the full steps lie for a fit: as asked for, or found by sampling, with TaylorSeer and with fits."""
    sigmas, show = job.source.sigmas, not job.console.quiet
    if job.interval is not None:
        wanted = Schedule.interval(len(sigmas) - 1, job.interval)
    elif job.calls is not None:
        wanted = Schedule.uniform_in_sigma(sigmas, job.calls)
    else:
        wanted = default_schedule(sigmas)
    if not job.seeks:
        return wanted
    judge = Judge(job.source, batch=job.batch, progress=show)
    if job.search or job.seconds is not None or job.decibels is not None:
        calls = None if job.seconds is not None or job.decibels is not None else len(wanted.full_steps)
        found = plan_for_budget(
            judge,
            lambda schedule: TaylorSeer(2, "sigma"),
            calls=calls,
            seconds=job.seconds,
            decibels=job.decibels,
            evaluations=job.search or _SEARCH,
            progress=show,
        )
        job.console.print(f"TaylorSeer there: {found.judged.decibels:.2f} dB after {found.evaluations} placements")
        wanted = found.schedule
    if job.refine:
        uniform = Schedule.uniform_in_sigma(sigmas, len(wanted.full_steps))
        starts = list(dict.fromkeys([wanted, uniform]))[: job.refine]
        found = search_placement(judge, starts, fit, evaluations=job.refine, progress=show)
        job.console.print(
            f"fitted there: {found.judged.decibels:.2f} dB on the fits' own runs after {found.evaluations} placements"
        )
        wanted = found.schedule
    return wanted


def _fit(method: Method, job: Job) -> str:
    """Fit coefficients, in one process; one predictor a branch."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError(f"--method {method.value} runs in one process, not in {torch.distributed.get_world_size()}")
    if job.epochs is not None or job.learning_rate is not None or job.tensorboard:
        raise ValueError(f"--epochs, --learning-rate and --tensorboard are not for --method {method.value}")
    if (job.out / checkpoint.FILE).is_file():
        raise ValueError(f"--out {job.out} holds a training; take another folder")
    # Before the work: a folder that cannot be written to is told at once.
    with reserved(job.out):
        save_predictors(_fitted(method, job), job.out)
    return "fitted; the same runs give the same coefficients"


def _fitted(method: Method, job: Job) -> dict[str, LinearPredictor | LesaPredictor]:
    """Fit a predictor."""
    show = not job.console.quiet
    through_tail = partial(fit_through_tail, job.source, batch=job.batch)
    schedule = _found_schedule(job, lambda tried: through_tail(tried, rounds=_ROUNDS_TO_TRY, progress=False))
    job.console.print(_placement(schedule, schedule), soft_wrap=True)
    fitted = through_tail(schedule, progress=show)
    if method is Method.tail:
        return {ONLY_BRANCH: fitted}
    torch.manual_seed(job.seed)
    sigmas = job.source.sigmas
    own = LesaPredictor(len(sigmas) - 1, segment_stages(sigmas, schedule), hidden_dim=_HIDDEN)
    fit_lesa(own, fitted, job.source, batch=job.batch, progress=show)
    return {ONLY_BRANCH: own}


METHODS: dict[Method, Callable[[Job], str]] = {
    Method.tuned: partial(_train_lesa, TrainingConfig.tuned),
    Method.published: partial(_train_lesa, TrainingConfig.published),
    Method.tail: partial(_fit, Method.tail),
    Method.lesa_tail: partial(_fit, Method.lesa_tail),
}
"""Learns, writes the predictors to the job's folder (several: in folders of their branches), returns what to tell."""

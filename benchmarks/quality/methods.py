"""Runs every method at one number of block calls on the unseen noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.least_squares import fit_features
from benchmarks.quality.setting import Setting
from lesa_kernels.predictors import HiCache, LesaPredictor, Predictor, Reuse, TaylorSeer
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import Evaluator, SelectedRuns, TrainingConfig, fit, fit_lesa, search_schedule, train

PUBLISHED, UNIFORM = "published rule", "uniform in sigma"
TAYLORS, OWN = "best for TaylorSeer", "best for coefficients"
INTERVALS = {10: 7, 8: 10, 6: 22}
"""Calls of the blocks at 50 steps -> interval of the published rule."""

LESA, LESA_TUNED, LESA_TAIL = "LESA as published", "LESA, tuned", "LESA through the tail"
TAYLOR, TAIL, EULER, BASHFORTH = "TaylorSeer 2, sigma", "coefficients through the tail", "Euler", "Adams-Bashforth 2"


@dataclass(frozen=True)
class Sampled:
    """Images by a method.

    Args:
        method: its name.
        schedule: what its schedule is called.
        full_steps: the steps on which the blocks ran.
        images: [B, size, size].
    """

    method: str
    schedule: str
    full_steps: tuple[int, ...]
    images: Tensor


@dataclass(frozen=True)
class Effort:
    """How much the searches may try.

    Args:
        taylor: schedules to try with TaylorSeer.
        coefficients: schedules to fit coefficients for, near the uniform one and near the best for TaylorSeer.
        runs: that those fits learn from, and as many others that they are judged on.
    """

    taylor: int = 80
    coefficients: int = 60
    runs: int = 8


def sampled(setting: Setting, calls: int, interval: int, effort: Effort) -> Iterator[Sampled]:
    """Yield the images of every method at a number of calls.

    Args:
        setting: the model and its noise.
        calls: of the blocks.
        interval: of the published rule that has so many.
        effort: of the searches.
    """
    torch.manual_seed(0)
    published = Schedule.interval(setting.steps, interval)
    taylor = TaylorSeer(2, "sigma")
    evaluator = Evaluator(setting.learnt_from, batch=len(setting.learnt_from), progress=False)
    uniform = Schedule.uniform_in_sigma(setting.sigmas, calls)
    taylors = search_schedule(
        lambda schedule: evaluator(taylor, schedule), uniform, placements=effort.taylor, progress=False
    ).schedule
    own = _own_schedule(setting, [uniform, taylors], effort)

    def by(name: str, schedule_name: str, predictor: Predictor, schedule: Schedule) -> Sampled:
        images, full_steps = setting.images(predictor, schedule)
        return Sampled(name, schedule_name, full_steps, images)

    for schedule_name, schedule in ((PUBLISHED, published), (UNIFORM, uniform), (TAYLORS, taylors), (OWN, own)):
        yield by("reuse", schedule_name, Reuse(), schedule)
        yield by("TaylorSeer 2, steps", schedule_name, TaylorSeer(2, "step"), schedule)
        yield by(TAYLOR, schedule_name, taylor, schedule)
        yield by("HiCache 2", schedule_name, HiCache(2), schedule)
        yield Sampled(EULER, schedule_name, schedule.full_steps, setting.solved(schedule, 1))
        yield Sampled(BASHFORTH, schedule_name, schedule.full_steps, setting.solved(schedule, 2))
        for name, predictor in through_tail(setting, schedule):
            yield by(name, schedule_name, predictor, schedule)
        if schedule_name in (PUBLISHED, TAYLORS):
            for name, predictor in _by_features(setting, schedule):
                yield by(name, schedule_name, predictor, schedule)
    for name, config in ((LESA, TrainingConfig.published()), (LESA_TUNED, TrainingConfig.tuned())):
        predictor = LesaPredictor(setting.steps)
        train(predictor, setting.trajectories, published, config, progress=False)
        yield by(name, PUBLISHED, predictor, published)


def _own_schedule(setting: Setting, starts: list[Schedule], effort: Effort) -> Schedule:
    """Search for the schedule that serves coefficients best: each that is tried gets a fit of its own."""
    source = setting.learning(2 * effort.runs)
    fitted_to, judged_on = (SelectedRuns(source, range(first, first + effort.runs)) for first in (0, effort.runs))
    evaluator = Evaluator(judged_on, batch=effort.runs, progress=False)

    def judge(schedule: Schedule) -> float:
        return evaluator(fit(fitted_to, schedule, rounds=2, batch=effort.runs, progress=False), schedule)

    return search_schedule(judge, starts, placements=effort.coefficients, progress=False).schedule


def through_tail(setting: Setting, schedule: Schedule) -> Iterator[tuple[str, Predictor]]:
    """Yield what is fitted to the latents, closed loop."""
    source, batch = setting.learnt_from, len(setting.learnt_from)
    tail = fit(source, schedule, rounds=3, batch=batch, progress=False)
    yield TAIL, tail
    yield LESA_TAIL, fit_lesa(source, tail, batch=batch, progress=False)


def _by_features(setting: Setting, schedule: Schedule) -> Iterator[tuple[str, Predictor]]:
    """Yield what is fitted to the features, step by step."""
    for name, window, over_all in (("closed form, 3 full (L2P)", 3, False), ("closed form, last 8", 8, True)):
        yield name, fit_features(setting.features, setting.sigmas, schedule, window=window, over_all=over_all)

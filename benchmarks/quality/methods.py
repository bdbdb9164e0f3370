"""All methods at one number of block calls: each yields images of the unseen noise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.quality.least_squares import fit_features
from benchmarks.quality.setting import Setting
from lesa_kernels.predictors import HiCache, LesaPredictor, LinearPredictor, Predictor, Reuse, TaylorSeer
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import (
    Judge,
    TrainingConfig,
    fit_lesa,
    fit_through_tail,
    search_placement,
    segment_stages,
    train,
)

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
        placement: where its calls lie.
        full_steps: which steps they are.
        images: [B, size, size].
    """

    method: str
    placement: str
    full_steps: tuple[int, ...]
    images: Tensor


@dataclass(frozen=True)
class Effort:
    """How long the searches may look.

    Args:
        taylor: placements to judge for TaylorSeer.
        coefficients: placements to fit coefficients for, near the uniform one and near the best for TaylorSeer.
        runs: that those fits learn from.
    """

    taylor: int = 80
    coefficients: int = 60
    runs: int = 8


def sampled(setting: Setting, calls: int, interval: int, effort: Effort) -> Iterator[Sampled]:
    """Yield every method at a number of calls.

    Args:
        setting: the model and its noise.
        calls: of the blocks.
        interval: of the published rule that has so many.
        effort: of the searches.
    """
    torch.manual_seed(0)
    published = Schedule.interval(setting.steps, interval)
    taylor = TaylorSeer(2, "sigma")
    judge = Judge(setting.learnt_from, batch=len(setting.learnt_from), progress=False)
    uniform = Schedule.uniform_in_sigma(setting.sigmas, calls)
    taylors = search_placement(judge, uniform, lambda _: taylor, evaluations=effort.taylor, progress=False).schedule
    own = _own_placement(setting, [uniform, taylors], effort)

    def by(name: str, placement: str, predictor: Predictor, schedule: Schedule) -> Sampled:
        images, full_steps = setting.images(predictor, schedule)
        return Sampled(name, placement, full_steps, images)

    for placement, schedule in ((PUBLISHED, published), (UNIFORM, uniform), (TAYLORS, taylors), (OWN, own)):
        yield by("reuse", placement, Reuse(), schedule)
        yield by("TaylorSeer 2, steps", placement, TaylorSeer(2, "step"), schedule)
        yield by(TAYLOR, placement, taylor, schedule)
        yield by("HiCache 2", placement, HiCache(2), schedule)
        yield Sampled(EULER, placement, schedule.full_steps, setting.solved(schedule, 1))
        yield Sampled(BASHFORTH, placement, schedule.full_steps, setting.solved(schedule, 2))
        for name, predictor in through_tail(setting, schedule):
            yield by(name, placement, predictor, schedule)
        if placement in (PUBLISHED, TAYLORS):
            for name, predictor in _by_features(setting, schedule):
                yield by(name, placement, predictor, schedule)
    for name, config in ((LESA, TrainingConfig.published()), (LESA_TUNED, TrainingConfig.tuned())):
        predictor = LesaPredictor(setting.steps)
        train(predictor, setting.trajectories, published, config, progress=False)
        yield by(name, PUBLISHED, predictor, published)


def _own_placement(setting: Setting, starts: list[Schedule], effort: Effort) -> Schedule:
    """Search for the placement that serves coefficients best: each that is judged gets a fit of its own."""
    source = setting.learning(effort.runs)

    def fit(schedule: Schedule) -> LinearPredictor:
        return fit_through_tail(source, schedule, rounds=2, batch=len(source), progress=False)

    judge = Judge(source, batch=len(source), progress=False)
    return search_placement(judge, starts, fit, evaluations=effort.coefficients, progress=False).schedule


def through_tail(setting: Setting, schedule: Schedule) -> Iterator[tuple[str, Predictor]]:
    """Yield what is fitted to the latents, closed loop."""
    source, batch = setting.learnt_from, len(setting.learnt_from)
    tail = fit_through_tail(source, schedule, rounds=3, batch=batch, progress=False)
    yield TAIL, tail
    form = LesaPredictor(setting.steps, segment_stages(setting.sigmas, schedule), hidden_dim=32)
    fit_lesa(form, tail, source, batch=batch, progress=False)
    yield LESA_TAIL, form


def _by_features(setting: Setting, schedule: Schedule) -> Iterator[tuple[str, Predictor]]:
    """Yield what is fitted to the features, step by step."""
    for name, window, over_all in (("closed form, 3 full (L2P)", 3, False), ("closed form, last 8", 8, True)):
        yield name, fit_features(setting.features, setting.sigmas, schedule, window=window, over_all=over_all)

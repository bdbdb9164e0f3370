"""Lists every method of the comparison: how it samples at a schedule, and where its full steps lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.quality.forecasters import OWN_SCHEDULES, TRAINING_FREE
from benchmarks.quality.least_squares import fit_features
from benchmarks.quality.measures import psnr
from benchmarks.quality.setting import Samples, Setting
from lesa_kernels.predictors import LesaPredictor, Predictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import (
    SolverFits,
    TrainingConfig,
    even_schedules,
    fit,
    fit_solver,
    search_schedule,
    train,
)
from lesa_kernels.training.schedule_search import Judge

INTERVALS = {10: 7, 8: 10, 6: 22}
"""Calls of the blocks at 50 steps -> interval of the published rule."""

TAIL = "coefficients through the tail"
SOLVER, SOLVER_FEW, SOLVER_MANY = "learned solver", "learned solver, 8 runs", "learned solver, 96 runs"
NO_LOOKAHEAD = "learned solver, no lookahead"
LESA, LESA_TUNED, L2P = "LESA as published", "LESA, tuned", "closed form on features (L2P)"
EULER, BASHFORTH = "Euler", "Adams-Bashforth 2"
SEARCHED = ("TaylorSeer 1, sigma", "TaylorSeer 2, sigma", "Spectrum", "Spectrum, free constant, sigma")
"""Of the training-free forecasters, those whose best schedule is searched for."""
RUNS = {SOLVER: 32, SOLVER_FEW: 8, SOLVER_MANY: 96, NO_LOOKAHEAD: 32}
OPTIONS: dict[str, dict[str, Any]] = {NO_LOOKAHEAD: {"lookahead": 0.0}}
"""Options of the fit and of its search where they are not the defaults."""
FEATURE_RUNS = 32

Images = tuple[Tensor, tuple[int, ...]]
"""Images, and the steps on which the blocks ran."""


@dataclass(frozen=True)
class Effort:
    """How much the searches of full steps may try.

    Args:
        placements: for each method.
        runs: that placements are judged on; fits learn from as many others.
    """

    placements: int = 60
    runs: int = 24


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        kind: "calibrated", "trained", "training-free" or "solver".
        sample: (samples to draw, setting, schedule) -> images.
        default: (setting, calls) -> its schedule by itself.
        searched: the method whose best schedule it takes: itself, another, or None where it has only its own.
    """

    kind: Literal["calibrated", "trained", "training-free", "solver"]
    sample: Callable[[Samples, Setting, Schedule], Images]
    default: Callable[[Setting, int], Schedule]
    searched: str | None = None


def uniform(setting: Setting, calls: int) -> Schedule:
    """Return the default of `lesa.enable`."""
    return Schedule.uniform_in_sigma(setting.known.sigmas, calls)


def published(setting: Setting, calls: int) -> Schedule:
    """Return LESA's own."""
    return Schedule.interval(setting.known.steps, INTERVALS[calls])


def _forecast(predictor: Predictor, samples: Samples, setting: Setting, schedule: Schedule) -> Images:
    return samples.forecast(predictor, schedule)


def _solved(order: Literal[1, 2], samples: Samples, setting: Setting, schedule: Schedule) -> Images:
    return samples.solved(schedule, order), schedule.full_steps


def _learned(name: str, samples: Samples, setting: Setting, schedule: Schedule) -> Images:
    runs = RUNS[name]
    source = setting.known.first(runs).source()
    predictor = fit_solver(source, schedule, batch=runs, progress=False, **OPTIONS.get(name, {}))
    return samples.forecast(predictor, schedule)


def _through_tail(samples: Samples, setting: Setting, schedule: Schedule) -> Images:
    source = setting.known.first(FEATURE_RUNS).source()
    return samples.forecast(fit(source, schedule, batch=len(source), progress=False), schedule)


def _least_squares(samples: Samples, setting: Setting, schedule: Schedule) -> Images:
    features = setting.known.first(FEATURE_RUNS).features
    return samples.forecast(fit_features(features, setting.known.sigmas, schedule, window=3), schedule)


def _trained(config: Callable[[], TrainingConfig], samples: Samples, setting: Setting, schedule: Schedule) -> Images:
    torch.manual_seed(0)
    predictor = LesaPredictor(setting.known.steps)
    train(predictor, setting.known.first(FEATURE_RUNS).recorded, schedule, config(), progress=False)
    return samples.forecast(predictor, schedule)


METHODS: dict[str, Method] = {
    **{
        name: Method("calibrated", partial(_learned, name), uniform, name if name in OPTIONS else SOLVER)
        for name in RUNS
    },
    **{
        name: Method(
            "training-free",
            partial(_forecast, predictor),
            (lambda setting, calls, name=name: OWN_SCHEDULES[name](setting.known.steps, calls))  # type: ignore[misc]
            if name in OWN_SCHEDULES
            else uniform,
            name if name in SEARCHED else None,
        )
        for name, predictor in TRAINING_FREE.items()
    },
    EULER: Method("solver", partial(_solved, 1), uniform, EULER),
    BASHFORTH: Method("solver", partial(_solved, 2), uniform, BASHFORTH),
    # Its own search would take hours; neither has a lookahead.
    TAIL: Method("calibrated", _through_tail, uniform, NO_LOOKAHEAD),
    L2P: Method("calibrated", _least_squares, uniform),
    LESA: Method("trained", partial(_trained, TrainingConfig.published), published),
    LESA_TUNED: Method("trained", partial(_trained, TrainingConfig.tuned), published),
}
"""Name -> method."""


def find_schedule(setting: Setting, name: str, calls: int, effort: Effort) -> Schedule:
    """Search for the full steps that serve a method best on the runs to learn from.

    Args:
        setting: the model.
        name: of the method.
        calls: full steps.
        effort: of the search.
    """
    method, known = METHODS[name], setting.known
    if method.kind == "calibrated":
        judge = _judge_of_fits(known, effort, OPTIONS.get(name, {}))
    else:
        judge = _judge_of(method, setting, effort)
    starts = even_schedules(known.sigmas, calls)
    return search_schedule(judge, starts, placements=effort.placements, progress=False).schedule


def _judge_of_fits(known: Samples, effort: Effort, options: dict[str, Any]) -> Judge:
    """Judge by the learned solver, on runs held out from its fit."""
    source = known.first(2 * effort.runs).source()
    return SolverFits(source, held_out=effort.runs, batch=len(source), progress=False, **options).psnr_db


def _judge_of(method: Method, setting: Setting, effort: Effort) -> Judge:
    """Judge by the images of a method that learns nothing."""
    judged = setting.known.first(effort.runs)
    return lambda schedule: psnr(method.sample(judged, setting, schedule)[0], judged.plain)[0]

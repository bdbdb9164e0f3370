"""Searches for the full steps that serve best, by sampling with them; also for a budget of calls, time or quality."""

from __future__ import annotations

import itertools
import reprlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa_kernels.checks import check_float, check_int, check_list, check_type
from lesa_kernels.predictors import Predictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.training.policies import PlanPolicy, SmallModels, batches, reference_run
from lesa_kernels.training.progress import progress_bar, waiting
from lesa_kernels.trajectories import TrajectorySource, check_source

# Distances that the search moves a full step by, one after the other.
_MOVES = (4, 2, 1)
_FEWEST_CALLS = 3

MakePredictor = Callable[[Schedule], Predictor | Mapping[str, Predictor]]
"""Makes what forecasts at a schedule: a constant for TaylorSeer, a fit for learned coefficients."""


@dataclass(frozen=True)
class Score:
    """How good and how fast accelerated runs were.

    Args:
        psnr_db: -20 log10 of the relative error of the final latents, mean over samples; higher is better.
        full_seconds: median time of a call whose blocks ran.
        forecast_seconds: median time of a call with a forecast in their place.
    """

    psnr_db: float
    full_seconds: float
    forecast_seconds: float


class Evaluator:
    """Compares accelerated with unaccelerated runs from the same noise.

    Args:
        source: runs a model that steps as Euler does, with guidance of two branches or without.
        batch: runs sampled as one batch.
        progress: show a bar while the unaccelerated runs are sampled.
    """

    def __init__(self, source: TrajectorySource, *, batch: int = 1, progress: bool = True) -> None:
        check_source(source)
        self.source = source
        self.sigmas = source.sigmas
        self._parts = batches(source, batch)
        steps = len(self.sigmas) - 1
        with progress_bar(progress) as bar:
            recording = bar.track(self._parts, description="sampling unaccelerated runs")
            self._references = [reference_run(source, runs, [steps]) for runs in recording]
        self._small = SmallModels()

    @torch.no_grad()
    def __call__(self, predictor: Predictor | Mapping[str, Predictor], schedule: Schedule) -> Score:
        """Sample all runs with a predictor, or one of each branch of guidance, and a schedule, and compare."""
        plans = (
            predictor.plan(self.sigmas, schedule)
            if isinstance(predictor, Predictor)
            else {branch: each.plan(self.sigmas, schedule) for branch, each in predictor.items()}
        )
        ratios: list[Tensor] = []
        full: list[float] = []
        forecast: list[float] = []
        for runs, reference in zip(self._parts, self._references, strict=True):
            policy = PlanPolicy(plans, reference)
            self.source.run(runs, self._small.limit(policy))
            if policy.final is None:
                raise ValueError("source must run a model with its tail and latents; this one holds features only")
            ratios.append(_psnr_db(policy.final, reference.latents[len(self.sigmas) - 1]))
            full += policy.full_seconds
            forecast += policy.forecast_seconds
        middle = statistics.median
        return Score(torch.cat(ratios).mean().item(), middle(full), middle(forecast) if forecast else 0.0)


def _psnr_db(latents: Tensor, reference: Tensor) -> Tensor:
    """Return -20 log10 of the relative error of each sample, [B]."""
    error = (latents - reference).float().flatten(1).norm(dim=1) / reference.float().flatten(1).norm(dim=1)
    ratios: Tensor = -20 * error.clamp_min(1e-6).log10()
    return ratios


@dataclass(frozen=True)
class FoundSchedule:
    """The result of a search.

    Args:
        schedule: the best full steps.
        score: of the runs with them.
        evaluations: how many schedules were tried.
    """

    schedule: Schedule
    score: Score
    evaluations: int


def search_schedule(
    evaluator: Evaluator,
    start: Schedule | Sequence[Schedule],
    make: MakePredictor,
    *,
    evaluations: int = 100,
    progress: bool = True,
) -> FoundSchedule:
    """Search for the full steps that serve best, at the number of calls of a start, by moving one at a time.

    Args:
        evaluator: of the runs.
        start: where to begin; `Schedule.uniform_in_sigma` is a good guess. Several share the evaluations: what is best
            near one is rarely best of all.
        make: makes the predictor of a schedule.
        evaluations: most schedules to try.
        progress: show a bar.

    Returns:
        The best schedule found, which is no worse than any start on these runs.

    Raises:
        TypeError: when an argument is of another type, or evaluator or make returns something else.
        ValueError: when there is no start, or fewer evaluations than starts.
    """
    starts = [start] if isinstance(start, Schedule) else check_list("start", start, "a Schedule or several")
    for index, each in enumerate(starts):
        check_type(f"start[{index}]", each, Schedule, "a Schedule")
    check_type("evaluator", evaluator, Callable, "an Evaluator")  # type: ignore[arg-type]
    check_type("make", make, Callable, "a function")  # type: ignore[arg-type]
    evaluations = check_int("evaluations", evaluations, 1)
    if not 1 <= len(starts) <= evaluations:
        raise ValueError(
            f"evaluations must be at least 1 a start and start not empty, got {evaluations} evaluations for "
            f"{len(starts)} starts"
        )
    seen: dict[tuple[int, ...], Score] = {}
    with progress_bar(progress) as bar:
        task = bar.add_task("searching for full steps", total=evaluations)

        def quality(full: tuple[int, ...]) -> float:
            if full not in seen:
                seen[full] = _score(evaluator, make, Schedule(starts[0].num_steps, full))
                best = max(score.psnr_db for score in seen.values())
                bar.update(task, advance=1, description=f"searching for full steps, best {best:.2f} dB")
            return seen[full].psnr_db

        ends = []
        for number, each in enumerate(starts):
            best = each.full_steps
            quality(best)
            share = evaluations * (number + 1) // len(starts)
            for distance in _MOVES:
                best = _climb(best, distance, each.num_steps, quality, lambda share=share: len(seen) < share)  # type: ignore[misc]
            ends.append(best)
        best = max(ends, key=quality)
    return FoundSchedule(Schedule(starts[0].num_steps, best), seen[best], len(seen))


def _score(evaluator: Evaluator, make: MakePredictor, schedule: Schedule) -> Score:
    """Evaluate the predictor that is made for a schedule."""
    predictor = make(schedule)
    check_type("make(schedule)", predictor, (Predictor, Mapping), "a Predictor or a mapping of them")
    score = evaluator(predictor, schedule)
    check_type("evaluator(predictor, schedule)", score, Score, "a Score")
    return score


def _climb(
    best: tuple[int, ...],
    distance: int,
    num_steps: int,
    quality: Callable[[tuple[int, ...]], float],
    may_go_on: Callable[[], bool],
) -> tuple[int, ...]:
    """Move single full steps by a distance as long as that helps."""
    improved = True
    while improved:
        improved = False
        for index, shift in itertools.product(range(1, len(best)), (-distance, distance)):
            low, high = best[index - 1], best[index + 1] if index + 1 < len(best) else num_steps
            moved = (*best[:index], best[index] + shift, *best[index + 1 :])
            if not low < moved[index] < high or not may_go_on():
                continue
            if quality(moved) > quality(best):
                best, improved = moved, True
    return best


def schedule_for_budget(
    evaluator: Evaluator,
    make: MakePredictor,
    *,
    calls: int | None = None,
    seconds: float | None = None,
    psnr_db: float | None = None,
    evaluations: int = 60,
    progress: bool = True,
) -> FoundSchedule:
    """Find the full steps that serve a budget best.

    Args:
        evaluator: of the runs.
        make: makes the predictor of a schedule.
        calls: so many full steps.
        seconds: or: as many as a run of one batch may last, by the measured times of both kinds of calls.
        psnr_db: or: as few as reach this bound, see `Score`.
        evaluations: most schedules to try in the search that follows.
        progress: show a bar.

    Returns:
        The best schedule found.

    Raises:
        TypeError: when an argument is of another type, or evaluator or make returns something else.
        ValueError: when not exactly one budget is given, or no number of calls below S meets it.
    """
    if sum(budget is not None for budget in (calls, seconds, psnr_db)) != 1:
        raise ValueError("give one budget: calls, seconds or psnr_db")
    if not callable(evaluator) or not hasattr(evaluator, "sigmas"):
        raise TypeError(f"evaluator must be an Evaluator, got {reprlib.repr(evaluator)}")
    check_type("make", make, Callable, "a function")  # type: ignore[arg-type]
    calls = calls if calls is None else check_int("calls", calls, 1)
    seconds = seconds if seconds is None else check_float("seconds", seconds, above=0)
    psnr_db = psnr_db if psnr_db is None else check_float("psnr_db", psnr_db)
    steps = len(evaluator.sigmas) - 1

    def uniform(count: int) -> Schedule:
        return Schedule.uniform_in_sigma(evaluator.sigmas, count)

    def search(count: int) -> FoundSchedule:
        return search_schedule(evaluator, uniform(count), make, evaluations=evaluations, progress=progress)

    def score(count: int) -> Score:
        return _score(evaluator, make, uniform(count))

    fewest = min(_FEWEST_CALLS, steps)
    if seconds is not None or psnr_db is not None:
        with waiting("measuring how many full steps the budget needs", progress):
            if seconds is not None:
                calls = _affordable(score(fewest), steps, seconds)
            if psnr_db is not None:
                calls = _sufficient(score, fewest, steps - 1, psnr_db)
    if calls is None or not 1 <= calls < steps:
        raise ValueError(f"calls must be 1 to {steps - 1}, so that a step is left to forecast, got {calls}")
    found = search(calls)
    while psnr_db is not None and found.score.psnr_db >= psnr_db and calls > 1:
        # With the full steps that were searched for, fewer calls than the guess may do.
        fewer = search(calls - 1)
        if fewer.score.psnr_db < psnr_db:
            break
        found, calls = fewer, calls - 1
    return found


def _affordable(score: Score, steps: int, seconds: float) -> int:
    """Return how many full calls fit into a time."""
    left = seconds - steps * score.forecast_seconds
    count = int(left / max(score.full_seconds - score.forecast_seconds, 1e-9))
    if count < 1:
        least = steps * score.forecast_seconds + score.full_seconds
        raise ValueError(f"seconds must allow one full call and {steps - 1} forecasts, {least:.3g} s, got {seconds}")
    return min(count, steps - 1)


def _sufficient(score: Callable[[int], Score], low: int, high: int, psnr_db: float) -> int:
    """Return the fewest calls, uniform in sigma, that reach a bound, by bisection."""
    if (best := score(high).psnr_db) < psnr_db:
        raise ValueError(f"psnr_db must be within reach: {high} calls give {best:.2f}, got {psnr_db}")
    while low < high:
        middle = (low + high) // 2
        if score(middle).psnr_db >= psnr_db:
            high = middle
        else:
            low = middle + 1
    return low

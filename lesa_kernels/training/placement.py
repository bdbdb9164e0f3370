"""Where the full steps should lie: a search over plans by the runs that they give, and plans for a budget."""

from __future__ import annotations

import itertools
import reprlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lesa_kernels.checks import check_float, check_int, check_list, check_type
from lesa_kernels.predictors import Predictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.training.policies import Following, batches, reference_run
from lesa_kernels.training.progress import progress_bar
from lesa_kernels.trajectories import TrajectorySource, check_source

# Distances that the search moves a full step by, one after the other.
_MOVES = (4, 2, 1)
_FEWEST_CALLS = 3

MakePredictor = Callable[[Schedule], Predictor]
"""Makes what forecasts at a schedule: a constant for TaylorSeer, a fit for learned coefficients."""


@dataclass(frozen=True)
class Judged:
    """What accelerated runs gave.

    Args:
        decibels: -20 log10 of the relative error of the final latents, mean over samples; higher is better.
        full_seconds: median time of a call whose blocks ran.
        forecast_seconds: median time of another call.
    """

    decibels: float
    full_seconds: float
    forecast_seconds: float


class Judge:
    """Compares accelerated with unaccelerated runs from the same noise.

    Args:
        source: runs a model that is called once a step and steps as Euler does.
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

    @torch.no_grad()
    def __call__(self, predictor: Predictor, schedule: Schedule) -> Judged:
        """Judge a predictor at a schedule."""
        plan = predictor.plan(self.sigmas, schedule)
        errors: list[Tensor] = []
        full: list[float] = []
        forecast: list[float] = []
        for runs, reference in zip(self._parts, self._references, strict=True):
            following = Following({reference.branch: plan}, self.sigmas, reference.sign)
            self.source.run(runs, following)
            if following.final is None:
                raise ValueError("source must run a model with its tail and latents; this one holds features only")
            errors.append(_decibels(following.final, reference.latents[len(self.sigmas) - 1]))
            full += following.full_seconds
            forecast += following.forecast_seconds
        middle = statistics.median
        return Judged(torch.cat(errors).mean().item(), middle(full), middle(forecast) if forecast else 0.0)


def _decibels(latents: Tensor, reference: Tensor) -> Tensor:
    """Return -20 log10 of the relative error of each sample, [B]."""
    error = (latents - reference).float().flatten(1).norm(dim=1) / reference.float().flatten(1).norm(dim=1)
    decibels: Tensor = -20 * error.clamp_min(1e-6).log10()
    return decibels


@dataclass(frozen=True)
class Placement:
    """What a search found.

    Args:
        schedule: the best full steps.
        judged: what they gave.
        evaluations: how many schedules were judged.
    """

    schedule: Schedule
    judged: Judged
    evaluations: int


def search_placement(
    judge: Judge,
    start: Schedule | Sequence[Schedule],
    make: MakePredictor,
    *,
    evaluations: int = 100,
    moves: Sequence[int] = _MOVES,
    progress: bool = True,
) -> Placement:
    """Search for the full steps that serve best, at the number of calls of a start, by moving one at a time.

    Args:
        judge: of the runs.
        start: where to begin; `Schedule.uniform_in_sigma` is a good guess. Several share the evaluations: what is best
            near one is rarely best of all.
        make: makes the predictor of a schedule.
        evaluations: most schedules to judge.
        moves: distances, large ones first.
        progress: show a bar.

    Returns:
        The best schedule found, which is no worse than any start on these runs.

    Raises:
        TypeError: when an argument is of another type, or judge or make returns something else.
        ValueError: when there are no moves, or fewer evaluations than starts.
    """
    starts = [start] if isinstance(start, Schedule) else check_list("start", start, "a Schedule or several")
    for index, each in enumerate(starts):
        check_type(f"start[{index}]", each, Schedule, "a Schedule")
    check_type("judge", judge, Callable, "a Judge")  # type: ignore[arg-type]
    check_type("make", make, Callable, "a function")  # type: ignore[arg-type]
    evaluations = check_int("evaluations", evaluations, 1)
    moves = [
        check_int(f"moves[{index}]", move, 1) for index, move in enumerate(check_list("moves", moves, "distances"))
    ]
    if not 1 <= len(starts) <= evaluations or not moves:
        raise ValueError(
            f"evaluations must be at least 1 a start and moves not empty, got {evaluations} evaluations for "
            f"{len(starts)} starts and moves {list(moves)}"
        )
    seen: dict[tuple[int, ...], Judged] = {}
    with progress_bar(progress) as bar:
        task = bar.add_task("searching for full steps", total=evaluations)

        def score(full: tuple[int, ...]) -> float:
            if full not in seen:
                schedule = Schedule(starts[0].num_steps, full)
                seen[full] = _judged(judge, make, schedule)
                bar.update(
                    task, advance=1, description=f"full steps: best {max(j.decibels for j in seen.values()):.2f} dB"
                )
            return seen[full].decibels

        ends = []
        for number, each in enumerate(starts):
            best = each.full_steps
            score(best)
            share = evaluations * (number + 1) // len(starts)
            for distance in moves:
                best = _climb(best, distance, each.num_steps, score, lambda share=share: len(seen) < share)  # type: ignore[misc]
            ends.append(best)
        best = max(ends, key=score)
    return Placement(Schedule(starts[0].num_steps, best), seen[best], len(seen))


def _judged(judge: Judge, make: MakePredictor, schedule: Schedule) -> Judged:
    """Judge what the functions of a search make of a schedule."""
    predictor = make(schedule)
    check_type("make(schedule)", predictor, Predictor, "a Predictor")
    judged = judge(predictor, schedule)
    check_type("judge(predictor, schedule)", judged, Judged, "a Judged")
    return judged


def _climb(
    best: tuple[int, ...],
    distance: int,
    num_steps: int,
    score: Callable[[tuple[int, ...]], float],
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
            if score(moved) > score(best):
                best, improved = moved, True
    return best


def plan_for_budget(
    judge: Judge,
    make: MakePredictor,
    *,
    calls: int | None = None,
    seconds: float | None = None,
    decibels: float | None = None,
    evaluations: int = 60,
    progress: bool = True,
) -> Placement:
    """Find the full steps that serve a budget best.

    Args:
        judge: of the runs.
        make: makes the predictor of a schedule.
        calls: so many full steps.
        seconds: or: as many as a run of one batch may last, by the measured times of both kinds of calls.
        decibels: or: as few as reach this bound, see `Judged`.
        evaluations: most schedules to judge in the search that follows.
        progress: show a bar.

    Returns:
        The best placement found.

    Raises:
        TypeError: when an argument is of another type, or judge or make returns something else.
        ValueError: when not exactly one budget is given, or none of S calls meets it.
    """
    if sum(budget is not None for budget in (calls, seconds, decibels)) != 1:
        raise ValueError("give one budget: calls, seconds or decibels")
    if not callable(judge) or not hasattr(judge, "sigmas"):
        raise TypeError(f"judge must be a Judge, got {reprlib.repr(judge)}")
    check_type("make", make, Callable, "a function")  # type: ignore[arg-type]
    calls = calls if calls is None else check_int("calls", calls, 1)
    seconds = seconds if seconds is None else check_float("seconds", seconds, above=0)
    decibels = decibels if decibels is None else check_float("decibels", decibels)
    steps = len(judge.sigmas) - 1

    def uniform(count: int) -> Schedule:
        return Schedule.uniform_in_sigma(judge.sigmas, count)

    def judged(count: int) -> Judged:
        return _judged(judge, make, uniform(count))

    if seconds is not None:
        times = judged(min(_FEWEST_CALLS, steps))
        calls = _affordable(times, steps, seconds)
    if decibels is not None:
        calls = _sufficient(judged, min(_FEWEST_CALLS, steps), steps - 1, decibels)
    if calls is None or not 1 <= calls < steps:
        raise ValueError(f"calls must be 1 to {steps - 1}, so that a step is left to forecast, got {calls}")
    found = search_placement(judge, uniform(calls), make, evaluations=evaluations, progress=progress)
    while decibels is not None and found.judged.decibels >= decibels and calls > 1:
        # A searched placement may do with fewer calls than the guess needed.
        fewer = search_placement(judge, uniform(calls - 1), make, evaluations=evaluations, progress=progress)
        if fewer.judged.decibels < decibels:
            break
        found, calls = fewer, calls - 1
    return found


def _affordable(times: Judged, steps: int, seconds: float) -> int:
    """Return how many full calls fit into a time."""
    left = seconds - steps * times.forecast_seconds
    count = int(left / max(times.full_seconds - times.forecast_seconds, 1e-9))
    if count < 1:
        least = steps * times.forecast_seconds + times.full_seconds
        raise ValueError(f"seconds must allow one full call and {steps - 1} forecasts, {least:.3g} s, got {seconds}")
    return min(count, steps - 1)


def _sufficient(judged: Callable[[int], Judged], low: int, high: int, decibels: float) -> int:
    """Return the fewest calls, uniform in sigma, that reach a bound, by bisection."""
    if (best := judged(high).decibels) < decibels:
        raise ValueError(f"decibels must be within reach: {high} calls give {best:.2f}, got {decibels}")
    while low < high:
        middle = (low + high) // 2
        if judged(middle).decibels >= decibels:
            high = middle
        else:
            low = middle + 1
    return low

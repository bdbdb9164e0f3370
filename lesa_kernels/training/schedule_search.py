"""Searches for the full steps that serve best, as a judge says: a fit of its own for each placement, or a predictor."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from lesa_kernels.checks import check_decreasing, check_float, check_int, check_list, check_type
from lesa_kernels.predictors import Predictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.training.plan_policy import PlanPolicy
from lesa_kernels.training.progress import progress_bar, waiting
from lesa_kernels.training.references import error_db, reference_run
from lesa_kernels.training.runs import SmallModels, batches
from lesa_kernels.trajectories import TrajectorySource, check_source

# How many full steps a change moves: mostly one or two. From a poor start, moves of one step alone get stuck.
_MOVED = (1, 1, 2, 2, 3)
# Farthest that they go in the first third of a search; 2 in the second, 1 in the last.
_FARTHEST = 3
# A search ends where so many random changes in turn lead to nothing new.
_DRAWS = 1000
_FEWEST_CALLS = 3
# Length of the last segment of an even schedule, the others' being 1: what is missed there no full step mends.
_LAST_SEGMENT = 2 / 3

Judge: TypeAlias = Callable[[Schedule], float]
"""Says how good a placement of the full steps is, in dB; higher is better. `SolverFits.psnr_db` is one."""


class Evaluator:
    """Compares accelerated with unaccelerated runs from the same noise.

    Together with a fit it makes a judge, `lambda schedule: evaluator(fit(source, schedule), schedule)`; fit to runs
    other than the evaluator's, see `SelectedRuns`.

    Args:
        source: runs a model that steps as Euler does, with guidance of two branches or without.
        batch: runs sampled as one batch.
        progress: show a bar while the unaccelerated runs are sampled.
    """

    def __init__(self, source: TrajectorySource, *, batch: int = 1, progress: bool = True) -> None:
        check_source(source)
        self.sigmas = source.sigmas
        self._source = source
        self._parts = batches(source, batch)
        steps = len(self.sigmas) - 1
        with progress_bar(progress) as bar:
            recording = bar.track(self._parts, description="sampling unaccelerated runs")
            self._references = [reference_run(source, runs, [steps]) for runs in recording]
        self._small = SmallModels()

    @torch.no_grad()
    def __call__(self, predictor: Predictor | Mapping[str, Predictor], schedule: Schedule) -> float:
        """Sample all runs with a predictor, or one of each branch of guidance, and a schedule, and compare.

        Returns:
            -20 log10 of the relative error of the final latents, in dB, mean over runs; higher is better.
        """
        check_type("predictor", predictor, (Predictor, Mapping), "a Predictor, or one of each branch")
        plans = (
            predictor.plan(self.sigmas, schedule)
            if isinstance(predictor, Predictor)
            else {branch: each.plan(self.sigmas, schedule) for branch, each in predictor.items()}
        )
        ratios: list[Tensor] = []
        for runs, reference in zip(self._parts, self._references, strict=True):
            policy = PlanPolicy(plans, reference)
            self._source.run(runs, self._small.limit(policy))
            if policy.final is None:
                raise ValueError("source must run a model with its tail and latents; this one holds features only")
            ratios.append(error_db(policy.final, reference.latents[len(self.sigmas) - 1], reference.moves))
        return torch.cat(ratios).mean().item()


@dataclass(frozen=True)
class FoundSchedule:
    """The result of a search.

    Args:
        schedule: the best full steps.
        psnr_db: what the judge said of them.
        placements: how many were tried.
    """

    schedule: Schedule
    psnr_db: float
    placements: int


def even_schedules(sigmas: Sequence[float], calls: int) -> list[Schedule]:
    """Return evenly spaced full steps, where a search may begin: first halfway between by step and by sigma.

    Then come those nearer to even in sigma, those by step, and `Schedule.uniform_in_sigma`. The last segment is two
    thirds as long as the others.

    Args:
        sigmas: S+1 falling noise levels.
        calls: how many full steps, 1 to S.

    Returns:
        The schedules, each once.

    Raises:
        ValueError: when calls are out of range or the sigmas do not fall.
    """
    levels = check_decreasing(sigmas)
    steps, span = len(levels) - 1, levels[0] - levels[-1]
    calls = check_int("calls", calls, 1, steps)
    found = []
    for weight in (0.5, 0.25, 1.0):
        # How much of the run is over before each step.
        over = [weight * step / steps + (1 - weight) * (levels[0] - levels[step]) / span for step in range(steps + 1)]
        found.append(_placed(over, [index / (calls - 1 + _LAST_SEGMENT) for index in range(calls)]))
    return list(dict.fromkeys([*found, Schedule.uniform_in_sigma(levels, calls)]))


def _placed(over: Sequence[float], wanted: Sequence[float]) -> Schedule:
    """Return the full steps whose values are nearest to those wanted, ascending from step 0."""
    steps, full = len(over) - 1, [0]
    for index, value in enumerate(wanted[1:], 1):
        # Room is left for those to come.
        candidates = range(full[-1] + 1, steps - (len(wanted) - 1 - index))
        full.append(min(candidates, key=lambda step: abs(over[step] - value)))
    return Schedule(steps, tuple(full))


def _starts(sigmas: Sequence[float], calls: int, like: Schedule | None) -> list[Schedule]:
    """Return where to begin a search: a placement spread or drawn together to a number of calls, and even ones."""
    starts = even_schedules(sigmas, calls)
    if like is None:
        return starts
    if like.num_steps != len(sigmas) - 1:
        raise ValueError(f"like must have {len(sigmas) - 1} steps, got {like.num_steps}")
    bounds = (*like.full_steps, like.num_steps)
    wanted = []
    for index in range(calls):
        segment, into = divmod(index * len(like.full_steps), calls)
        wanted.append(bounds[segment] + (bounds[segment + 1] - bounds[segment]) * into / calls)
    return list(dict.fromkeys([_placed(range(like.num_steps + 1), wanted), *starts]))


def search_schedule(
    judge: Judge, start: Schedule | Sequence[Schedule], *, placements: int = 60, progress: bool = True
) -> FoundSchedule:
    """Search for the full steps that serve best, at the number of calls of a start, by moving some of them at random.

    All starts are tried; from the best one on, each change that is better is kept. The same arguments give the same
    search. With `SolverFits.psnr_db` for a judge, placements that begin alike share calls of the model.

    Args:
        judge: says how good a placement is. What it measures should not be what it fits to.
        start: where to begin, such as `even_schedules`.
        placements: most placements to try.
        progress: show a bar, with the best so far.

    Returns:
        The best schedule found, which is no worse than any start.

    Raises:
        TypeError: when an argument is of another type, or the judge returns no number.
        ValueError: when there is no start, or fewer placements than starts, or starts differ in their numbers of steps.
    """
    starts = [start] if isinstance(start, Schedule) else check_list("start", start, "a Schedule or several")
    for index, each in enumerate(starts):
        check_type(f"start[{index}]", each, Schedule, "a Schedule")
        if each.num_steps != starts[0].num_steps or len(each.full_steps) != len(starts[0].full_steps):
            raise ValueError(f"start must hold schedules of as many steps and full steps, got {starts}")
    placements = _check_search(judge, placements)
    if not 1 <= len(starts) <= placements:
        raise ValueError(
            f"placements must be at least 1 a start and start not empty, got {placements} placements for "
            f"{len(starts)} starts"
        )
    seen: dict[Schedule, float] = {}
    with progress_bar(progress) as bar:
        calls = len(starts[0].full_steps)
        task = bar.add_task(f"searching for {calls} full steps", total=placements)

        def quality(schedule: Schedule) -> float:
            if schedule not in seen:
                decibels = check_float("what judge returns", judge(schedule), finite=False)
                seen[schedule] = -math.inf if math.isnan(decibels) else decibels
                text = f"searching for {calls} full steps, best {max(seen.values()):.2f} dB"
                bar.update(task, advance=1, description=text)
            return seen[schedule]

        best = max(starts, key=quality)
        chance = random.Random(0)
        while len(seen) < placements:
            reach = 1 + int(_FARTHEST * (1 - len(seen) / placements))
            changed = _changed(best, reach, seen, chance)
            if changed is None:
                break
            best = max(best, changed, key=quality)
        bar.update(task, total=len(seen))
    return FoundSchedule(best, seen[best], len(seen))


def _check_search(judge: object, placements: object) -> int:
    """Check what all searches take; return the number of placements."""
    check_type("judge", judge, Callable, "a function")  # type: ignore[arg-type]
    return check_int("placements", placements, 1)


def _changed(schedule: Schedule, reach: int, seen: Container[Schedule], chance: random.Random) -> Schedule | None:
    """Move some full steps at random by a reach at most, to a schedule that was not seen; None where none is found."""
    steps, count = schedule.num_steps, len(schedule.full_steps)
    for _ in range(_DRAWS):
        full = list(schedule.full_steps)
        for index in chance.sample(range(1, count), min(count - 1, chance.choice(_MOVED))):
            full[index] += chance.choice((-1, 1)) * chance.randint(1, reach)
        if all(before < after for before, after in itertools.pairwise((*full, steps))):
            changed = Schedule(steps, tuple(full))
            if changed not in seen:
                return changed
    return None


def fewest_calls(
    judge: Judge, sigmas: Sequence[float], psnr_db: float, *, placements: int = 60, progress: bool = True
) -> FoundSchedule:
    """Find the fewest calls that reach a bound, and where they go.

    Evenly spaced full steps show how many are enough; then the best of so many is searched for, and of fewer, as long
    as those reach the bound too.

    Args:
        judge: says how good a placement is.
        sigmas: S+1 falling noise levels.
        psnr_db: the bound, in dB.
        placements: most to try at each number of calls.
        progress: show a bar.

    Returns:
        The best schedule found.

    Raises:
        TypeError: see `search_schedule`.
        ValueError: when an argument is out of range, or no number of calls below S reaches the bound.
    """
    placements = _check_search(judge, placements)
    psnr_db = check_float("psnr_db", psnr_db)
    steps = len(check_decreasing(sigmas)) - 1
    low, high = min(_FEWEST_CALLS, steps - 1), steps - 1

    def evenly(calls: int) -> float:
        return judge(even_schedules(sigmas, calls)[0])

    with waiting("measuring how many full steps are enough", progress):
        if (best := evenly(high)) < psnr_db:
            raise ValueError(f"psnr_db must be within reach: {high} calls give {best:.2f}, got {psnr_db}")
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if evenly(middle) >= psnr_db else (middle + 1, high)
    found = search_schedule(judge, even_schedules(sigmas, low)[:placements], placements=placements, progress=progress)
    for calls in range(low - 1, 0, -1):
        starts = _starts(sigmas, calls, found.schedule)
        fewer = search_schedule(judge, starts[:placements], placements=placements, progress=progress)
        if fewer.psnr_db < psnr_db:
            break
        found = fewer
    return found


def quality_curve(
    judge: Judge,
    sigmas: Sequence[float],
    calls: Sequence[int],
    *,
    like: Schedule | None = None,
    placements: int = 20,
    progress: bool = True,
) -> dict[int, FoundSchedule]:
    """Search at several numbers of calls, so that a budget can be picked; see `plot_curve`.

    Args:
        judge: says how good a placement is.
        sigmas: S+1 falling noise levels.
        calls: numbers of full steps, each 1 to S.
        like: a placement that is tried first, spread or drawn together to each number of calls; later numbers start
            from what was found for the one before.
        placements: most to try at each number of calls; 1 measures evenly spaced full steps, or those like `like`.
        progress: show a bar.

    Returns:
        What was found, by the number of calls.

    Raises:
        TypeError, ValueError: see `search_schedule` and `even_schedules`.
    """
    placements = _check_search(judge, placements)
    if like is not None:
        check_type("like", like, Schedule, "a Schedule or None")
    counts = sorted(check_int("calls", count, 1) for count in check_list("calls", calls, "numbers of full steps"))
    found: dict[int, FoundSchedule] = {}
    with progress_bar(progress) as bar:
        task = bar.add_task("measuring budgets", total=placements * len(counts))

        def counted(schedule: Schedule) -> float:
            bar.advance(task)
            return judge(schedule)

        for number, count in enumerate(counts):
            starts = _starts(sigmas, count, like)[:placements]
            found[count] = search_schedule(counted, starts, placements=placements, progress=False)
            text = f"measuring budgets, {count} calls {found[count].psnr_db:.2f} dB"
            bar.update(task, completed=placements * (number + 1), description=text)
            if placements > 1:
                like = found[count].schedule
    return found

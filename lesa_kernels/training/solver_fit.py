"""Fits the learned solver: ridge least squares in closed loop, segment after segment.

The runs follow the coefficients found so far. What a model answered at a full step depends on the full steps before it
alone, so it is kept under these: a later segment, or another schedule that begins alike, does not call the model again.
"""

from __future__ import annotations

import statistics
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lesa_kernels.checks import check_float, check_int
from lesa_kernels.guidance import Guidance
from lesa_kernels.predictors import SolverPredictor
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.training.progress import progress_bar
from lesa_kernels.training.references import Branches, Reference, error_db, reference_run
from lesa_kernels.training.runs import SeenStep, SmallModels, StepWatcher, batches, run_until_stopped
from lesa_kernels.trajectories import ModelCall, StopRun, TrajectorySource, check_source, watch

_WINDOW, _LOOKAHEAD = 3, 0.3
# Of the diagonal: it takes nothing from what the data say, and keeps coefficients of like columns small.
_RIDGE = 1e-4
# Relative to the larger of 1 and the scale: by how much guidance of one kind may seem to vary from step to step.
_SAME_SCALE = 0.02


@torch.no_grad()
def fit_solver(
    source: TrajectorySource,
    schedule: Schedule | ScheduleRule,
    *,
    window: int = _WINDOW,
    lookahead: float = _LOOKAHEAD,
    ridge: float = _RIDGE,
    target: TrajectorySource | None = None,
    batch: int = 1,
    progress: bool = True,
) -> SolverPredictor:
    """Fit a learned solver; the model is called S times a run for the references, and once at each full step.

    Args:
        source: runs a model whose latents go by Euler's steps of a flow, with guidance of two branches or without.
        schedule: which steps are full.
        window: K, full steps whose velocities count.
        lookahead: the first call is told the noise level that lies at so much of the way to the second full step, 0 to
            1; 0 is its own. Runs that start late, and sources whose calls have no `ModelCall.tell`, keep their own.
        ridge: of the least squares, relative to each column's mean square.
        target: runs from the same noise whose latents are to be reached instead of `source`'s own: with finer levels,
            among which are all of `source`'s (see `PipelineSource.refined`).
        batch: runs sampled as one batch.
        progress: show a bar.

    Returns:
        The predictor.

    Raises:
        TypeError: when an argument is of another type.
        ValueError: when an argument is out of range, or the source has no runs, no tail, guidance of another kind, or
            steps that are not Euler's.
        FloatingPointError: when latents are not finite; names the step.
    """
    fits = SolverFits(
        source, window=window, lookahead=lookahead, ridge=ridge, target=target, batch=batch, progress=progress
    )
    return fits.fit(schedule, progress=progress)


@dataclass(frozen=True)
class _FullStep:
    """A full step, and what the model is told of the noise level there, None for what the source says."""

    step: int
    timestep: float | None = None


_Path: TypeAlias = tuple[_FullStep, ...]


@dataclass(frozen=True)
class _Batch:
    """Some runs that are sampled together: their numbers, x_T, which rows of the latents move, and what is to be met.

    Tokens of a condition do not move; `moves` is [runs, ..., 1]. `target` holds the latents of the unaccelerated runs
    before each step, and at the end.
    """

    runs: Sequence[int]
    noise: Tensor
    moves: Tensor
    target: Sequence[Tensor]


@dataclass(frozen=True)
class _Answer:
    """What a batch shows at a full step: the model's outputs by call, and float32 latents and velocities.

    Without guidance `uncond`, `cond` and `velocity`, which the scheduler gets, are one.
    """

    outputs: Mapping[str, Tensor]
    latents: Tensor
    uncond: Tensor
    cond: Tensor
    velocity: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        tensors = (*self.outputs.values(), self.latents, self.uncond, self.cond, self.velocity)
        return sum({id(each): each.nbytes for each in tensors}.values())


class SolverFits:
    """Fits learned solvers to the runs of one source, at any number of schedules.

    The unaccelerated runs are sampled when it is made.

    Args:
        source: see `fit_solver`.
        held_out: so many of its last runs are not fitted to; `psnr_db` is measured on them.
        window: see `fit_solver`.
        lookahead: see `fit_solver`.
        ridge: see `fit_solver`.
        target: see `fit_solver`.
        batch: see `fit_solver`.
        memory: bytes, on the model's device, of its answers that are kept for schedules that begin alike; those of one
            schedule are always.
        progress: show a bar while the unaccelerated runs are sampled.

    Raises:
        TypeError, ValueError: see `fit_solver`; also when no run is left to fit to.
    """

    @torch.no_grad()
    def __init__(
        self,
        source: TrajectorySource,
        *,
        held_out: int = 0,
        window: int = _WINDOW,
        lookahead: float = _LOOKAHEAD,
        ridge: float = _RIDGE,
        target: TrajectorySource | None = None,
        batch: int = 1,
        memory: int = 4 << 30,
        progress: bool = True,
    ) -> None:
        check_source(source, may_start_late=True)
        if (reason := getattr(source, "solver_incompatibility", None)) is not None:
            raise ValueError(f"source must step as Euler does: {reason}")
        self.sigmas = source.sigmas
        self.window = check_int("window", window, 1)
        fitted = len(source) - check_int("held_out", held_out, 0)
        if fitted < 1:
            raise ValueError(f"held_out must leave a run to fit to, got {held_out} of {len(source)} runs")
        self._fitted = range(fitted)
        self._judged = range(fitted if held_out else 0, len(source))
        self._exchanged: SolverFits | None = None
        if len(self.sigmas) < 3:
            raise ValueError(f"source must have at least 2 steps, got {len(self.sigmas) - 1}")
        self.first_step = 0
        self.model_calls = 0  # steps of single runs at which the model was called
        self._source = source
        self._small = SmallModels()
        self._ridge = check_float("ridge", ridge, above=0)
        self._lookahead = check_float("lookahead", lookahead)
        if not 0 <= self._lookahead <= 1:
            raise ValueError(f"lookahead must be 0 to 1, got {lookahead}")
        self._timesteps: dict[int, float] = {}  # what the model is told in each step, where it can be told otherwise
        self._memory = check_int("memory", memory, 0)
        self._answers: OrderedDict[_Path, list[_Answer]] = OrderedDict()
        self._found: dict[tuple[_Path, int], Tensor] = {}
        self._branches = Branches()
        self._batches: list[_Batch] = []
        seen: dict[int, list[Guidance]] = {}
        with progress_bar(progress) as bar:
            for runs in bar.track(batches(source, batch), description="sampling unaccelerated runs"):
                reference, sampled = self._sample(source, runs)
                self._batches.append(sampled)
                self._branches, self.first_step = reference.branches, min(reference.latents)
                for step, guidance in reference.guidance.items():
                    seen.setdefault(step, []).append(guidance)
            self._guidance = _steadied(seen)
            if target is not None:
                check_source(target, may_start_late=True)
                places = _places(self.sigmas, target.sigmas)
                for number, own in enumerate(bar.track(self._batches, description="sampling the runs to be reached")):
                    reached, finer = self._sample(target, own.runs)
                    if (begin := min(reached.latents)) != (due := places[self.first_step]):
                        raise ValueError(
                            f"target must begin its runs at step {due}, the noise level at which those of source "
                            f"begin, it begins at step {begin}"
                        )
                    if not torch.allclose(finer.noise, own.noise, rtol=1e-2, atol=1e-2):
                        raise ValueError("target must begin its runs with the noise of those of source")
                    self._batches[number] = replace(own, target=[finer.target[place] for place in places])

    def full_steps(self, schedule: Schedule | ScheduleRule) -> tuple[int, ...]:
        """Return the full steps of a schedule for runs that begin where those of the source do.

        Args:
            schedule: which steps are full, or a rule that makes it from the sigmas.

        Raises:
            ValueError: when it is for another number of steps.
        """
        resolved = schedule if isinstance(schedule, Schedule) else schedule(self.sigmas)
        if resolved.num_steps != len(self.sigmas) - 1:
            raise ValueError(f"schedule must have {len(self.sigmas) - 1} steps, got {resolved.num_steps}")
        return (self.first_step, *(step for step in resolved.full_steps if step > self.first_step))

    @torch.inference_mode(False)
    @torch.no_grad()
    def fit(self, schedule: Schedule | ScheduleRule, *, progress: bool = True) -> SolverPredictor:
        """Fit the coefficients of a schedule; see `fit_solver`.

        Args:
            schedule: which steps are full.
            progress: show a bar.

        Returns:
            The predictor.
        """
        full, branches = self.full_steps(schedule), self._branches
        path = self._path(full)
        predictor = SolverPredictor(
            self.sigmas,
            full,
            self.window,
            branches.names if branches.are_guided else (),
            branches.is_batched,
            [self._guidance[step] for step in full] if branches.are_guided else [],
            branches.sign,
            path[0].timestep,
        )
        with progress_bar(progress) as bar:
            for position in bar.track(range(len(full)), description="fitting segment by segment"):
                found = self._coefficients(path[: position + 1], self._end(path, position))
                terms = predictor.terms(position)
                columns = [column for column, term in enumerate(terms) if term is not None]
                predictor.coefficients[position, columns] = found
        return predictor

    @torch.no_grad()
    def psnr_db(self, schedule: Schedule | ScheduleRule) -> float:
        """Return how near the held-out runs end to the unaccelerated ones, by the fit to the others.

        Args:
            schedule: which steps are full.

        Returns:
            -20 log10 of the relative error of the final latents, mean over the held-out runs; over all runs where none
            is held out.
        """
        path = self._path(self.full_steps(schedule))
        ratios = []
        for number, each in enumerate(self._batches):
            chosen = [row for row, run in enumerate(each.runs) if run in self._judged]
            if not chosen:
                continue
            reached = self._reached(path, len(self.sigmas) - 1, number)
            ratios.append(error_db(reached, each.target[-1], each.moves)[chosen])
        return torch.cat(ratios).mean().item()

    def include_held_out(self) -> None:
        """Fit to all runs from now on; what was found without the held-out ones is forgotten."""
        self._fitted = self._judged = range(len(self._source))
        self._exchanged = None
        self._answers.clear()
        self._found.clear()

    def eulers(self) -> SolverFits:
        """Return the same runs without coefficients: `psnr_db` is then of Euler's method on the full steps alone."""
        plain = self._copy()
        plain._memory, plain._lookahead = 0, 0.0
        # Beyond all data, so that nothing is added to Euler's step.
        plain._ridge = 1e30
        return plain

    def cross_validated_db(self, schedule: Schedule | ScheduleRule) -> float:
        """Return the mean of `psnr_db` and of what it is with fitted and held-out runs exchanged; for few runs.

        Args:
            schedule: which steps are full.
        """
        if self._exchanged is None:
            self._exchanged = self._copy()
            self._exchanged._fitted, self._exchanged._judged = self._judged, self._fitted
        return (self.psnr_db(schedule) + self._exchanged.psnr_db(schedule)) / 2

    def _copy(self) -> SolverFits:
        """Return fits of their own to the same runs."""
        other = copy(self)
        other.model_calls, other._answers, other._found, other._exchanged = 0, OrderedDict(), {}, None
        return other

    def _path(self, full: tuple[int, ...]) -> _Path:
        """Return full steps with what the model is told: in the first call a noise level that is still to come."""
        timestep = None
        # After a segment of one step nothing is left that could correct it.
        if self._lookahead and full[0] == 0 and full[1:2] > (1,) and {*full[:2]} <= set(self._timesteps):
            here, there = (self._timesteps[step] for step in full[:2])
            timestep = here + self._lookahead * (there - here)
        return (_FullStep(full[0], timestep), *(_FullStep(step) for step in full[1:]))

    def _end(self, path: _Path, position: int) -> int:
        """Return the step at which a segment ends."""
        return path[position + 1].step if position + 1 < len(path) else len(self.sigmas) - 1

    def _sample(self, source: TrajectorySource, runs: Sequence[int]) -> tuple[Reference, _Batch]:
        """Sample some runs in full."""

        def answer(call: ModelCall) -> Tensor | None:
            if call.tell is not None and call.timestep is not None and source is self._source:
                self._timesteps[call.step] = call.timestep
            return self._called(call, len(runs))

        reference = reference_run(source, runs, answer=answer)
        first = min(reference.latents)
        if reference.moves is None:
            raise ValueError("source must call its model in at least 2 steps")
        moves = reference.moves
        # Steps before the first are of no run.
        target = [reference.latents[max(step, first)] for step in range(len(source.sigmas))]
        return reference, _Batch(runs, target[first].to(moves.device, torch.float32), moves, target)

    def _called(self, call: ModelCall, rows: int, timestep: float | None = None) -> Tensor | None:
        """Run the model, told what the source says of the noise level or otherwise."""
        self.model_calls += rows
        if timestep is not None and call.tell is not None:
            call.tell(timestep)
        return watch(call)[1]

    def _answer(self, step: SeenStep, guidance: Guidance | None) -> _Answer:
        """Return what a full step shows."""
        uncond, cond = self._branches.velocities_of(step)
        velocity = cond if guidance is None else guidance.combine(uncond, cond)
        return _Answer(step.outputs, self._branches.latents_of(step).float(), uncond, cond, velocity)

    def _observe(self, path: _Path) -> list[_Answer]:
        """Return what all batches show at the last of some full steps, which come first in a schedule."""
        if path not in self._answers:
            self._answers[path] = [self._run(path, number) for number in range(len(self._batches))]
            # Those of the schedule in work are needed until its end.
            others = [key for key in self._answers if key != path[: len(key)]]
            while others and self._used() > self._memory:
                del self._answers[others.pop(0)]
        self._answers.move_to_end(path)
        return self._answers[path]

    def _used(self) -> int:
        """Return the bytes that kept answers take."""
        return sum(each.nbytes for answers in self._answers.values() for each in answers)

    def _run(self, path: _Path, number: int) -> _Answer:
        """Sample a batch up to a full step; what earlier full steps answered is known."""
        runs, due = self._batches[number].runs, path[-1].step
        known: dict[int, _Answer] = {}
        answers: dict[int, Tensor] = {}
        for position, each in enumerate(path[:-1]):
            known[each.step] = self._observe(path[: position + 1])[number]
            if (end := self._end(path, position)) > each.step + 1:
                answers[each.step] = self._velocity(path[: position + 1], end, number)
        shown: SeenStep | None = None

        def answer(call: ModelCall) -> Tensor | None:
            if call.step == due:
                return self._called(call, len(runs), path[-1].timestep)
            if call.step in known:
                # A loop may write to what it gets.
                return known[call.step].outputs[call.branch].clone()
            begin = max(step for step in known if step < call.step)
            like = next(iter(known[begin].outputs.values()))
            velocity = (self._branches.sign * answers[begin]).to(like.dtype)
            return torch.cat([velocity, velocity]) if self._branches.is_batched else velocity

        def close(done: SeenStep, after: Tensor) -> None:
            nonlocal shown
            if done.step == due:
                shown = done
                raise StopRun

        watcher = StepWatcher(answer, close)
        run_until_stopped(self._source, runs, self._small.limit(watcher))
        shown = shown or watcher.last
        if shown is None or shown.step != due:
            raise ValueError(f"source must run all {len(self.sigmas) - 1} steps, it ended before step {due}")
        return self._answer(shown, self._guidance.get(due))

    def _columns(self, path: _Path, number: int) -> list[Tensor]:
        """Return what the coefficients of a segment count for, in the order of `SolverPredictor.terms`, float32."""
        recent = [self._observe(path[: len(path) - k])[number] for k in range(min(self.window, len(path)))]
        noise = self._batches[number].noise
        if not self._branches.are_guided:
            return [noise, *(each.velocity for each in recent)]
        return [noise, *(each.uncond for each in recent), *(each.cond - each.uncond for each in recent)]

    def _coefficients(self, path: _Path, end: int) -> Tensor:
        """Return the coefficients of the segment from the last of some full steps to its end, float64."""
        key = (path, end)
        if key in self._found:
            return self._found[key]
        begin = path[-1].step
        sums: Tensor | None = None
        count = len(self._columns(path, 0))
        if end > begin + 1:
            for number, each in enumerate(self._batches):
                rows = [row for row, run in enumerate(each.runs) if run in self._fitted]
                if not rows:
                    continue
                answer = self._observe(path)[number]
                aim = each.target[end].to(answer.latents)
                left = aim - answer.latents - (self.sigmas[end] - self.sigmas[begin]) * answer.velocity
                parts = [(part * each.moves)[rows[0] : rows[-1] + 1] for part in (*self._columns(path, number), left)]
                products = torch.ops.lesa.gram(parts)[:-1, :-1].cpu()
                sums = products if sums is None else sums + products
        if sums is None:
            found = torch.zeros(count, dtype=torch.float64)
        else:
            if not bool(torch.isfinite(sums).all()):
                raise FloatingPointError(f"latents or velocities of step {begin} are not finite")
            matrix, aims = sums[:-1, :-1], sums[:-1, -1:]
            damped = matrix + self._ridge * torch.diag(matrix.diagonal())
            found = torch.linalg.lstsq(damped, aims, driver="gelsd").solution[:, 0]
        self._found[key] = found
        return found

    def _change(self, path: _Path, end: int, number: int) -> Tensor:
        """Return r, what the fit adds to Euler's step from a full step to the end of its segment, float32."""
        columns = self._columns(path, number)
        row = self._coefficients(path, end).to(columns[0])[None]
        change: Tensor = torch.ops.lesa.forecast(columns, row, row.new_zeros(1))[0]
        return change

    def _velocity(self, path: _Path, end: int, number: int) -> Tensor:
        """Return the velocity that leads from the step after a full step to the end of its segment, float32."""
        left = self.sigmas[end] - self.sigmas[path[-1].step + 1]
        return self._observe(path)[number].velocity + self._change(path, end, number) / left

    def _reached(self, path: _Path, end: int, number: int) -> Tensor:
        """Return the latents at the end of a segment, float32."""
        answer = self._observe(path)[number]
        length = self.sigmas[end] - self.sigmas[path[-1].step]
        return answer.latents + length * answer.velocity + self._change(path, end, number)


def _places(sigmas: Sequence[float], finer: Sequence[float]) -> list[int]:
    """Return where the levels of a run lie among those of a finer one."""
    places = [min(range(len(finer)), key=lambda place: abs(finer[place] - sigma)) for sigma in sigmas]
    for sigma, place in zip(sigmas, places, strict=True):
        if abs(finer[place] - sigma) > 1e-5:
            raise ValueError(f"target must pass all noise levels of source, it has none at {sigma:.5f}")
    return places


def _steadied(seen: Mapping[int, Sequence[Guidance]]) -> dict[int, Guidance]:
    """Return the guidance of each step: the median over runs, and over neighboring steps that seem to have the same."""
    groups: list[list[Guidance]] = []
    of_step: dict[int, list[Guidance]] = {}
    for step in sorted(seen):
        newest = Guidance(statistics.median(each.scale for each in seen[step]))
        if groups:
            earlier = statistics.median(each.scale for each in groups[-1])
            alike = abs(newest.scale - earlier) <= _SAME_SCALE * max(1.0, abs(earlier))
            if not alike or seen[step][0].rule != groups[-1][0].rule:
                groups.append([])
        else:
            groups.append([])
        groups[-1] += seen[step]
        of_step[step] = groups[-1]
    return {
        step: Guidance(
            statistics.median(each.scale for each in group),
            group[0].rule,
            statistics.median(each.rescale for each in group),
        )
        for step, group in of_step.items()
    }

"""Fits coefficients through the model's tail, so that each segment ends where the unaccelerated run passes.

The error of a feature is not quality: what counts is the output that the tail makes of it, and of that the sum along
the steps, since between two full steps the model sees no latents. The derivatives go through the tail alone (forward
mode, one pass of the tail a coefficient); the blocks are never differentiated.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
import torch.autograd.forward_ad as forward_ad
from rich.progress import Progress
from torch import Tensor

from lesa_kernels.checks import check_int
from lesa_kernels.plan import Row
from lesa_kernels.predictors import LinearPredictor, Reuse, TaylorSeer
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.training.levenberg_marquardt import LevenbergMarquardt
from lesa_kernels.training.progress import progress_bar
from lesa_kernels.training.references import Reference, reference_run
from lesa_kernels.training.runs import SmallModels, batches, run_until_stopped
from lesa_kernels.trajectories import ModelCall, StopRun, TrajectorySource, check_source, watch

_TAYLOR_ORDER = 2
# The first step's damping, and the relative gain of the squared distance that is worth another round.
_DAMPING, _WORTHWHILE = 0.03, 1e-3
MOST_ROUNDS = 40

Coefficients: TypeAlias = dict[int, dict[int, float]]
"""Of each forecast step: the coefficient of each full step that it is made from."""

BranchCoefficients: TypeAlias = dict[str, Coefficients]
"""Of each branch of guidance."""


@torch.inference_mode(False)
@torch.no_grad()
def fit(
    source: TrajectorySource,
    schedule: Schedule | ScheduleRule,
    *,
    window: int = 3,
    rounds: int | None = None,
    batch: int = 1,
    progress: bool = True,
) -> LinearPredictor | dict[str, LinearPredictor]:
    """Fit the coefficients of every forecast step through the model's tail, by Levenberg-Marquardt.

    Goes from segment to segment in closed loop: the runs follow the coefficients found so far, full steps see the
    latents that came of it, and the segment's coefficients are moved so that it ends where the unaccelerated run
    passes; what earlier segments left is corrected as far as the features allow.

    Args:
        source: runs a model that steps as Euler does (a rectified flow), with guidance of two branches or without.
        schedule: which steps are full.
        window: K, full features that a forecast reads.
        rounds: most passes over the runs for each segment, at least 2; None goes on until each has converged.
        batch: runs sampled as one batch.
        progress: show a bar, and how near each segment came.

    Returns:
        The predictor; with guidance one for each branch, as `lesa.enable` takes them. Where one call of the model holds
        both branches, "uncond" stands for the first half of its batch.

    Raises:
        TypeError: when an argument is of another type.
        ValueError: when an argument is out of range, the schedule leaves nothing to forecast, or the source has no
            runs, no tail, more than two calls a step, two models, other guidance than `lesa_kernels.guidance` knows, or
            other steps than Euler's.
        FloatingPointError: when latents are not finite; names the steps.
    """
    # One to measure, one to try a change.
    most = MOST_ROUNDS if rounds is None else check_int("rounds", rounds, 2)
    check_source(source)
    sigmas = source.sigmas
    resolved = Schedule(len(sigmas) - 1, Reuse().plan(sigmas, schedule).full_steps)
    if len(resolved.full_steps) == resolved.num_steps:
        raise ValueError("schedule must leave a step to forecast, got full steps only")
    predictor = LinearPredictor(sigmas, resolved.full_steps, window)
    # The search starts at TaylorSeer's coefficients.
    taylor = TaylorSeer(min(_TAYLOR_ORDER, predictor.window - 1)).rows(sigmas)
    start: Coefficients = {}
    for segment in segments(resolved):
        before = [full for full in resolved.full_steps if full <= segment.full_step]
        for step in segment.steps:
            row = taylor(step, before)
            terms = {} if row is None else row.terms
            start[step] = {full: terms.get(full, 0.0) for full in predictor.sources(step)}
    with progress_bar(progress) as bar:
        runs = ClosedLoopRuns(source, resolved, batch, bar)
        coefficients = {branch: dict(start) for branch in runs.branches}
        for segment in runs.track(most):
            search = LevenbergMarquardt(
                _vector(coefficients, segment), name=segment.name, damping=_DAMPING, worthwhile=_WORTHWHILE
            )
            runs.minimize(search, coefficients, segment, most)
            runs.report(search, segment, is_limited=rounds is not None)
    found = {
        branch: LinearPredictor.from_rows(sigmas, resolved, {step: Row(terms) for step, terms in each.items()}, window)
        for branch, each in coefficients.items()
    }
    return found if len(found) > 1 else next(iter(found.values()))


@dataclass(frozen=True)
class _Segment:
    """A full step, the forecasts after it, and the step at which it ends."""

    full_step: int
    steps: tuple[int, ...]
    end: int

    @property
    def name(self) -> str:
        """Its steps, for messages."""
        return f"steps {self.full_step + 1} to {self.end - 1}"


def segments(schedule: Schedule) -> list[_Segment]:
    """Split a schedule at its full steps; segments without forecasts are left out."""
    bounds = itertools.pairwise([*schedule.full_steps, schedule.num_steps])
    return [_Segment(full, tuple(range(full + 1, end)), end) for full, end in bounds if end > full + 1]


def _vector(coefficients: BranchCoefficients, segment: _Segment) -> Tensor:
    """Return the coefficients of a segment as one float64 vector, branch by branch, step by step."""
    values = [value for each in coefficients.values() for step in segment.steps for value in each[step].values()]
    return torch.tensor(values, dtype=torch.float64)


def _assign(coefficients: BranchCoefficients, segment: _Segment, values: Tensor) -> None:
    """Set the coefficients of a segment from a vector."""
    remaining = iter(values.tolist())
    for each in coefficients.values():
        for step in segment.steps:
            each[step] = {full: next(remaining) for full in each[step]}


class ClosedLoopRuns:
    """Samples runs with given coefficients up to the end of a segment, and hands its derivatives to a search.

    Args:
        source: the runs; they are sampled once without acceleration here.
        schedule: which steps are full.
        batch: runs sampled as one batch.
        bar: shows how far the passes over the runs have come.
    """

    def __init__(self, source: TrajectorySource, schedule: Schedule, batch: int, bar: Progress) -> None:
        self._source = source
        self._schedule = schedule
        self._segments = segments(schedule)
        self._parts = batches(source, batch)
        self._bar = bar
        ends = [segment.end for segment in self._segments]
        recording = bar.track(self._parts, description="sampling unaccelerated runs")
        self._references = [reference_run(source, runs, ends) for runs in recording]
        self._small = SmallModels()

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches of guidance; one without guidance."""
        return self._references[0].branches.names

    def track(self, rounds: int) -> Iterator[_Segment]:
        """Yield the segments, with a bar over all passes that each may take."""
        passes = rounds * len(self._parts)
        description = "fitting segment by segment"
        self._task = self._bar.add_task(description, total=passes * len(self._segments))
        for number, segment in enumerate(self._segments):
            self._name = f"{description}, {segment.name}"
            yield segment
            self._bar.update(self._task, completed=passes * (number + 1))

    def minimize(
        self, search: LevenbergMarquardt, coefficients: BranchCoefficients, segment: _Segment, rounds: int
    ) -> None:
        """Search for the coefficients of a segment, in place, in so many passes over the runs at most."""
        for _ in range(rounds):
            _assign(coefficients, segment, search.candidate)
            for key, (runs, reference) in enumerate(zip(self._parts, self._references, strict=True)):
                columns, residual = self._derivatives(runs, reference, coefficients, segment)
                with self._small.threads():
                    search.add(key, columns, residual)
                self._bar.advance(self._task)
            search.close_round()
            self._bar.update(self._task, description=f"{self._name}: {100 * search.residual:.1f} % left")
            if search.finished:
                break
        _assign(coefficients, segment, search.best)

    def report(self, search: LevenbergMarquardt, segment: _Segment, *, is_limited: bool) -> None:
        """Print how near a segment came to its end, and warn where nobody asked the search to stop so early."""
        if not self._bar.disable:
            left = f"{100 * search.residual:.1f} % of TaylorSeer's distance is left after {search.rounds} rounds"
            end = "converged" if search.finished else "not converged"
            self._bar.console.print(f"{segment.name}: {left}, {end}", soft_wrap=True, highlight=False)
        if not search.finished and not is_limited:
            warnings.warn(
                f"the fit of {segment.name} has not converged after {search.rounds} rounds; rounds= allows more",
                UserWarning,
                stacklevel=3,
            )

    def _derivatives(
        self, runs: Sequence[int], reference: Reference, coefficients: BranchCoefficients, segment: _Segment
    ) -> tuple[list[Tensor], Tensor]:
        """Return the derivatives of the latents at a segment's end, and how far they are from the reference's."""
        sigmas, branches = self._source.sigmas, reference.branches
        full: dict[str, dict[int, Tensor]] = {name: {} for name in branches.names}
        columns: dict[str, list[Tensor]] = {name: [] for name in branches.names}
        outputs: dict[str, Tensor] = {}  # of the present step
        slopes: dict[str, list[Tensor]] = {}
        latest: Tensor | None = None  # output of a call
        residual: Tensor | None = None

        def own(call: ModelCall) -> Tensor:
            if call.latents is None or latest is None:
                raise ValueError("source must run a model with its latents in each step")
            return branches.own(call.latents, latest)

        def finish(latents: Tensor) -> None:
            nonlocal residual
            residual = latents.float() - reference.latents[segment.end].to(latents.device, torch.float32)
            raise StopRun

        def close(call: ModelCall) -> None:
            length = sigmas[call.step + 1] - sigmas[call.step]
            for name in slopes:
                _, changes = derivatives(
                    lambda output, name=name: reference.velocity(call.step, outputs | {name: output}),  # type: ignore[misc]
                    outputs[name],
                    slopes[name],
                )
                columns[name] += [length * change for change in changes]
            if call.step == len(sigmas) - 2:
                finish(own(call).float() + length * reference.velocity(call.step, outputs).float())
            outputs.clear()
            slopes.clear()

        def policy(call: ModelCall) -> Tensor | None:
            nonlocal latest
            if call.tail is None:
                raise ValueError("source must run a model with its tail and latents; this one holds features only")
            if call.step == segment.end:
                finish(own(call))
            names = branches.names if branches.is_batched else (call.branch,)
            if call.step in self._schedule.full_steps:
                feature, output = watch(call)
                for name, part in branches.split(call.branch, feature).items():
                    full[name][call.step] = part
            else:
                terms = [coefficients[name][call.step] for name in names]
                histories = [[full[name][step] for step in each] for name, each in zip(names, terms, strict=True)]
                parts = [_combine(*each) for each in zip(histories, terms, strict=True)]
                # The tail treats each sample alone: one pass moves both halves of a batch, each in its own direction.
                directions = [_joined(parts) for parts in zip(*histories, strict=True)]
                is_fitted = call.step in segment.steps
                output, changes = derivatives(call.tail, _joined(parts), directions if is_fitted else [])
                if is_fitted:
                    split = [branches.split(call.branch, change) for change in changes]
                    slopes.update({name: [each[name] for each in split] for name in names})
            if output is not None:
                # A loop may write to what it gets.
                latest = output.clone()
                outputs.update(branches.split(call.branch, latest))
            if len(outputs) == len(branches.names):
                close(call)
            return output

        run_until_stopped(self._source, runs, self._small.limit(policy))
        if residual is None:
            raise ValueError(f"source must run all {len(sigmas) - 1} steps, it ended before step {segment.end}")
        return list(itertools.chain.from_iterable(columns.values())), residual


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the halves of a batch as one tensor."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _combine(features: Sequence[Tensor], terms: Mapping[int, float]) -> Tensor:
    """Return a combination of features [*feature]."""
    row = torch.tensor([list(terms.values())], dtype=torch.float32, device=features[0].device)
    result: Tensor = torch.ops.lesa.forecast(list(features), row, row.new_zeros(1))[0]
    return result


@torch.inference_mode(False)
@torch.no_grad()
def derivatives(
    tail: Callable[[Tensor], Tensor], feature: Tensor, directions: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the tail's output and its derivatives in some directions.

    Args:
        tail: feature -> output.
        feature: [*feature].
        directions: each [*feature].

    Returns:
        [*output], and as many derivatives [*output].

    Raises:
        ValueError: when the tail detaches the feature.
    """
    _load_rules()
    if feature.is_inference():
        # A view of it, which make_dual returns, would have no derivative.
        feature = feature.clone()
    output, slopes = None, []
    for direction in directions:
        # A compiled graph would drop the derivative.
        with torch.compiler.set_stance("force_eager"), forward_ad.dual_level():
            dual = forward_ad.unpack_dual(tail(forward_ad.make_dual(feature, direction)))
            if dual.tangent is None:
                raise ValueError("call.tail must be differentiable in forward mode, this one loses the derivative")
            output = dual.primal
            slopes.append(dual.tangent)
    return tail(feature) if output is None else output, slopes


@cache
def _load_rules() -> None:
    """Load torch's rules of forward mode, which warn of torch.jit.script, torch's own doing."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))

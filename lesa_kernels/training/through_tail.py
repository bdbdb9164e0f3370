"""Fits through the model's tail: coefficients are judged by what the latents become.

The error of a feature is not quality: what counts is the output that the tail makes of it, and of that the sum along
the steps, since between two full steps the model sees no latents. The derivatives go through the tail alone (forward
mode, one pass of the tail a coefficient); the blocks are never differentiated.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from lesa_kernels.checks import check_int, check_type
from lesa_kernels.plan import Row
from lesa_kernels.predictors import LinearPredictor, Predictor, TaylorSeer
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.training.damped import DampedFit
from lesa_kernels.training.policies import Reference, batches, euler, reference_run, run_until_stopped
from lesa_kernels.training.progress import progress_bar
from lesa_kernels.trajectories import ModelCall, StopRun, TrajectorySource, check_source, watch


def combine(features: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return a combination of features [*feature]."""
    row = torch.tensor([list(coefficients)], dtype=torch.float32, device=features[0].device)
    result: Tensor = torch.ops.lesa.forecast(list(features), row, row.new_zeros(1))[0]
    return result


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
    """Let torch load its rules of forward mode, which warn of torch.jit.script, torch's own doing."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


def resolved(sigmas: Sequence[float], schedule: Schedule | ScheduleRule) -> Schedule:
    """Return a schedule for these sigmas.

    Raises:
        TypeError: when it is neither a schedule nor a rule that makes one.
        ValueError: when it is for another number of steps, or leaves nothing to forecast.
    """
    if not isinstance(schedule, Schedule) and not callable(schedule):
        raise TypeError(f"schedule must be a Schedule or a rule that makes one, got {type(schedule).__name__}")
    found = schedule if isinstance(schedule, Schedule) else schedule(sigmas)
    if not isinstance(found, Schedule):
        raise TypeError(f"schedule must make a Schedule from the sigmas, got {type(found).__name__}")
    if found.num_steps != len(sigmas) - 1:
        raise ValueError(f"schedule must have {len(sigmas) - 1} steps, got {found.num_steps}")
    if len(found.full_steps) == found.num_steps:
        raise ValueError("schedule must leave a step to forecast, got full steps only")
    return found


@dataclass(frozen=True)
class Segment:
    """A full step, the forecasts after it, and the step at which it ends."""

    full_step: int
    steps: tuple[int, ...]
    end: int

    @property
    def name(self) -> str:
        """As messages call it."""
        return f"steps {self.full_step + 1} to {self.end - 1}"


def segments(schedule: Schedule) -> list[Segment]:
    """Split a schedule at its full steps."""
    bounds = [*schedule.full_steps, schedule.num_steps]
    return [Segment(full, tuple(range(full + 1, end)), end) for full, end in itertools.pairwise(bounds)]


@dataclass
class _Rows:
    """The coefficients of all forecast steps, by step and source."""

    values: dict[int, dict[int, float]] = field(default_factory=dict)

    def keys(self, steps: Sequence[int]) -> list[tuple[int, int]]:
        """Return (step, source) of every coefficient of some steps."""
        return [(step, source) for step in steps for source in self.values[step]]

    def vector(self, keys: Sequence[tuple[int, int]]) -> Tensor:
        """Return coefficients as a vector."""
        return torch.tensor([self.values[step][source] for step, source in keys], dtype=torch.float64)

    def assign(self, keys: Sequence[tuple[int, int]], vector: Tensor) -> None:
        """Set coefficients from a vector."""
        for (step, source), value in zip(keys, vector.tolist(), strict=True):
            self.values[step][source] = value


class _Walk:
    """A policy that follows rows closed loop up to the end of a segment, and hands that segment's derivatives over.

    Args:
        sigmas: S+1 noise levels.
        schedule: of the full steps.
        rows: coefficients; the segment's are the fit's candidate.
        segment: which one.
        reference: of the unaccelerated runs, whose latents the segment should end in.
        receive: takes the columns, in the order of steps and sources, and the residual.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        schedule: Schedule,
        rows: Mapping[int, Mapping[int, float]],
        segment: Segment,
        reference: Reference,
        receive: Callable[[list[Tensor], Tensor], None],
    ) -> None:
        self._sigmas = sigmas
        self._schedule = schedule
        self._rows = rows
        self._segment = segment
        self._reference = reference
        self._receive = receive
        self._full: dict[int, Tensor] = {}
        self._columns: list[Tensor] = []

    def __call__(self, call: ModelCall) -> Tensor | None:
        if call.latents is None or call.tail is None:
            raise ValueError("source must run a model with its tail and latents; this one holds features only")
        if call.step == self._segment.end:
            self._finish(call.latents)
        if call.step in self._schedule.full_steps:
            self._full[call.step], output = watch(call)
        else:
            output = self._forecast(call, call.tail)
        if output is not None and call.step == len(self._sigmas) - 2:
            self._finish(euler(call, output, self._sigmas, self._reference.sign))
        return output

    def _forecast(self, call: ModelCall, tail: Callable[[Tensor], Tensor]) -> Tensor:
        row = self._rows[call.step]
        history = [self._full[source] for source in row]
        feature = combine(history, list(row.values()))
        if call.step not in self._segment.steps:
            return tail(feature)
        output, slopes = derivatives(tail, feature, history)
        length = self._reference.sign * (self._sigmas[call.step + 1] - self._sigmas[call.step])
        self._columns += [length * slope for slope in slopes]
        return output

    def _finish(self, latents: Tensor) -> None:
        self._receive(self._columns, latents - self._reference.latents[self._segment.end].to(latents))
        raise StopRun


def _start(sigmas: Sequence[float], predictor: LinearPredictor, schedule: Schedule, start: Predictor) -> _Rows:
    """Begin with the rows of another predictor, as far as they lie within the predictor's windows."""
    rule = start.rows(sigmas)
    rows = _Rows()
    for segment in segments(schedule):
        before = [full for full in schedule.full_steps if full <= segment.full_step]
        for step in segment.steps:
            given = rule(step, before)
            sources = predictor.sources(step)
            if given is None or not set(given.terms) <= set(sources) or given.offset:
                raise ValueError(
                    f"start must forecast step {step} from full steps within the window, {sources}, got {given}"
                )
            rows.values[step] = {source: given.terms.get(source, 0.0) for source in sources}
    return rows


@torch.no_grad()
def fit_through_tail(
    source: TrajectorySource,
    schedule: Schedule | ScheduleRule,
    *,
    window: int = 3,
    start: Predictor | None = None,
    rounds: int = 4,
    batch: int = 1,
    progress: bool = True,
) -> LinearPredictor:
    """Fit per-step coefficients over full features through the model's tail, by damped Gauss-Newton.

    Goes from segment to segment in closed loop: the runs follow the coefficients found so far, full steps see the
    latents that came of it, and the segment's coefficients are moved so that it ends where the unaccelerated run
    passes; what earlier segments left is corrected as far as the features allow.

    Args:
        source: runs a model that is called once a step and steps as Euler does (a rectified flow).
        schedule: where the full steps lie.
        window: K, full features that a forecast reads.
        start: where the search starts, a predictor over full features; None takes TaylorSeer in sigma.
        rounds: passes over the runs for each segment, at least 2.
        batch: runs sampled as one batch.
        progress: show a bar.

    Returns:
        The predictor.

    Raises:
        ValueError: when an argument is out of range, or the source has no runs, no tail, several calls a step, or
            other steps than Euler's.
        FloatingPointError: when latents are not finite; names the steps.
    """
    # One to measure, one to judge a change.
    rounds = check_int("rounds", rounds, 2)
    check_source(source)
    placement = resolved(source.sigmas, schedule)
    predictor = LinearPredictor(source.sigmas, placement.full_steps, window)
    if start is None:
        start = TaylorSeer(min(2, window - 1))
    check_type("start", start, Predictor, "a Predictor or None")
    rows = _start(source.sigmas, predictor, placement, start)
    _fit(source, placement, rows, rounds, batch, progress)
    found = {step: Row(dict(values)) for step, values in rows.values.items()}
    return LinearPredictor.from_rows(source.sigmas, placement, found, window)


def _fit(source: TrajectorySource, schedule: Schedule, rows: _Rows, rounds: int, batch: int, progress: bool) -> None:
    parts = batches(source, batch)
    todo = [segment for segment in segments(schedule) if segment.steps]
    with progress_bar(progress) as bar:
        ends = [segment.end for segment in todo]
        recording = bar.track(parts, description="sampling unaccelerated runs")
        references = [reference_run(source, runs, ends) for runs in recording]
        for segment in bar.track(todo, description="fitting segment by segment"):
            keys = rows.keys(segment.steps)
            fit = DampedFit(rows.vector(keys), name=segment.name)
            for _ in range(rounds):
                rows.assign(keys, fit.candidate)
                collect_segment(source, schedule, rows.values, segment, parts, references, fit)
                fit.close_round()
                if fit.finished:
                    break
            rows.assign(keys, fit.best)


def collect_segment(
    source: TrajectorySource,
    schedule: Schedule,
    rows: Mapping[int, Mapping[int, float]],
    segment: Segment,
    parts: Sequence[Sequence[int]],
    references: Sequence[Reference],
    fit: DampedFit,
) -> None:
    """Run all runs up to the end of a segment and add its derivatives to a fit.

    Args:
        source: of the runs.
        schedule: of the full steps.
        rows: coefficients by step and source; those of the segment are differentiated in.
        segment: which one.
        parts: the batches.
        references: of each batch, with the latents that the segment should end in.
        fit: takes the sums.
    """
    for key, (runs, reference) in enumerate(zip(parts, references, strict=True)):
        walk = _Walk(
            source.sigmas,
            schedule,
            rows,
            segment,
            reference,
            lambda columns, residual, key=key: fit.add(key, columns, residual),  # type: ignore[misc]
        )
        run_until_stopped(source, runs, walk)

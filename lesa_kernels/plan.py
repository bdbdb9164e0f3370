"""Compiles a predictor, a schedule and the sigmas into a plan, before a sampling run starts.

A predictor's gains depend on the schedule alone, so each forecast is a row of constants over earlier features.
Between two full steps no new information arrives: the rows of a segment are composed, in float64, into one matrix over
the features that are resident after the full step, and one launch computes the whole segment. Slots of the ring are
assigned by liveness.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

from lesa_kernels.checks import check_decreasing, check_int, check_type
from lesa_kernels.schedule import Schedule, ScheduleRule

# What one launch of `forecast_into` takes.
MAX_INPUTS = 64
MAX_OUTPUTS = 64


Term: TypeAlias = "int | tuple[int, str]"
"""A tensor of a step: its feature, or with a name one of several *quantities* that a full step hands in."""


def step_of(term: Term) -> int:
    """Return the step of a term."""
    return term if isinstance(term, int) else term[0]


@dataclass(frozen=True)
class Row:
    """One forecast: sum over terms of coefficient * that tensor, plus an offset.

    Args:
        terms: coefficient of each tensor that the forecast reads: features of earlier steps, full or forecast alike, or
            quantities of full steps.
        offset: added to every element.
    """

    terms: Mapping[Any, float]  # of Term; Mapping is invariant in its keys, and most rows have steps alone
    offset: float = 0.0


RowRule: TypeAlias = Callable[[int, Sequence[int]], "Row | None"]
"""(step, the run's full steps before it, ascending) -> the row of that step, or None where the history is too short."""


@dataclass(frozen=True)
class Launch:
    """One call of the forecast kernel: M tensors from K resident ones. Steps with equal rows share one.

    Args:
        steps: the steps that it serves.
        output: for each of them, which of the M tensors is its forecast.
        inputs: the K terms that it reads.
        read: their slots.
        write: the M slots that it fills.
        coefficients: M rows of K, float64.
        offsets: M, float64.
    """

    steps: tuple[int, ...]
    output: tuple[int, ...]
    inputs: tuple[Term, ...]
    read: tuple[int, ...]
    write: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]
    offsets: tuple[float, ...]


@dataclass(frozen=True)
class Check:
    """What a full step would have been forecast from, to be compared with its feature.

    Args:
        inputs: the K terms that the forecast reads.
        read: their slots, which hold them until the feature of the full step lies in its own.
        coefficients: K, float64.
        offset: added to every element.
    """

    inputs: tuple[Term, ...]
    read: tuple[int, ...]
    coefficients: tuple[float, ...]
    offset: float


@dataclass(frozen=True)
class Segment:
    """A full step and the forecasts that follow it.

    Args:
        full_step: the full step.
        slots: where its terms go: its feature or its quantities, without those that nothing reads.
        launches: one for the whole segment, or several when the plan was made with a chunk.
        check: what the full step is compared with, None where it is not.
    """

    full_step: int
    slots: Mapping[Term, int]
    launches: tuple[Launch, ...]
    check: Check | None = None


@dataclass(frozen=True)
class Plan:
    """The compiled form of a predictor, a schedule and the sigmas. Made by `Predictor.plan`.

    Args:
        sigmas: the S+1 noise levels.
        segments: one for each full step.
        num_slots: features that the ring holds at once.
        num_terms: reads that the uncomposed, step-by-step form makes (for the passes that are saved).
        first_step: where the run starts (not 0 for image-to-image).
    """

    sigmas: tuple[float, ...]
    segments: tuple[Segment, ...]
    num_slots: int
    num_terms: int
    first_step: int = 0

    @property
    def num_steps(self) -> int:
        """S, the steps of the schedule."""
        return len(self.sigmas) - 1

    @property
    def full_steps(self) -> tuple[int, ...]:
        """The steps on which the blocks run: the schedule's, and those for which the history was too short."""
        return tuple(segment.full_step for segment in self.segments)

    @property
    def quantities(self) -> frozenset[str]:
        """The quantities that full steps hand in; none where they hand in their feature."""
        terms = [term for segment in self.segments for term in segment.slots]
        return frozenset(term[1] for term in terms if not isinstance(term, int))

    @property
    def speedup(self) -> float:
        """Steps of the run divided by full steps."""
        return (self.num_steps - self.first_step) / len(self.segments)

    @property
    def checked_steps(self) -> tuple[int, ...]:
        """The full steps that are compared with what they would have been forecast."""
        return tuple(segment.full_step for segment in self.segments if segment.check is not None)

    @cached_property
    def shared_steps(self) -> frozenset[int]:
        """The forecast steps whose tensor serves a later step too, or is read for one: it must not be written to."""
        launches = [launch for segment in self.segments for launch in segment.launches]
        checks = [segment.check for segment in self.segments if segment.check is not None]
        read = {term for launch in launches for term in launch.inputs}
        read.update(term for check in checks for term in check.inputs)
        return frozenset(
            step
            for launch in launches
            for position, (step, row) in enumerate(zip(launch.steps, launch.output, strict=True))
            if row in launch.output[position + 1 :] or launch.steps[launch.output.index(row)] in read
        )

    def is_full(self, step: int) -> bool:
        """Whether a step is full.

        Args:
            step: 0 to S-1.
        """
        return step in self.full_steps

    def ring_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Return the bytes of the ring.

        Args:
            shape: of a feature.
            itemsize: bytes of an element.

        Raises:
            TypeError: when the shape holds something else than sizes.
            ValueError: when a size is negative.
        """
        if isinstance(shape, str | bytes) or not isinstance(shape, Sequence):
            raise TypeError(f"shape must be a sequence of sizes, got {reprlib.repr(shape)}")
        shape = [check_int(f"shape[{dim}]", size, 0) for dim, size in enumerate(shape)]
        return self.num_slots * math.prod(shape) * check_int("itemsize", itemsize, 1)

    @property
    def passes(self) -> tuple[int, int]:
        """Features read and forecasts written, all in all: (as planned, step by step)."""
        launches = [launch for segment in self.segments for launch in segment.launches]
        reads, writes = sum(len(launch.inputs) for launch in launches), sum(len(launch.write) for launch in launches)
        return reads + writes, self.num_terms + sum(len(launch.steps) for launch in launches)

    def describe(self, shape: Sequence[int] | None = None, itemsize: int = 2) -> str:
        """Describe the plan in a few lines.

        Args:
            shape: of a feature, for the ring's size in MiB.
            itemsize: bytes of an element, 2 for bfloat16.

        Returns:
            The text.
        """
        planned, stepwise = self.passes
        run = self.num_steps - self.first_step
        lines = [
            f"{run} steps: {len(self.segments)} full, {run - len(self.segments)} forecast "
            f"({self.speedup:.2f}x fewer block calls)",
            "full steps: " + " ".join(map(str, self.full_steps)),
        ]
        if self.checked_steps:
            lines.append("checked steps: " + " ".join(map(str, self.checked_steps)))
        if self.passes[1]:
            lines.append("segments:")
        for segment in self.segments:
            for launch in segment.launches:
                first, last = launch.steps[0], launch.steps[-1]
                steps = f"step {first}" if first == last else f"steps {first}-{last}"
                lines.append(
                    f"  after {segment.full_step}: {steps} from {len(launch.inputs)} "
                    f"{'tensors' if self.quantities else 'features'}, of steps "
                    + " ".join(map(str, dict.fromkeys(map(step_of, launch.inputs))))
                )
        ring = f"ring: {self.num_slots} slots"
        if shape is not None:
            size = self.ring_bytes(shape, itemsize) / 2**20
            ring += f", {size:.1f} MiB for features of shape {tuple(shape)} with {itemsize} bytes an element"
        lines.append(ring)
        if stepwise:
            lines.append(
                f"passes over memory: {planned} instead of {stepwise} step by step ({stepwise - planned} saved)"
            )
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.describe()


def check_count(name: str, count: object) -> None:
    """Check a number of which None means that there is none: `chunk`, `check_every`.

    Raises:
        TypeError: when it is neither an int nor None.
        ValueError: when it is less than 1.
    """
    if count is None:
        return
    if not isinstance(count, int):
        raise TypeError(f"{name} must be an int or None, got {count!r}")
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")


def compile_plan(
    sigmas: Sequence[float],
    schedule: Schedule | ScheduleRule,
    rule: RowRule,
    *,
    first_step: int = 0,
    chunk: int | None = None,
    check_every: int | None = None,
) -> Plan:
    """Compile rows into a plan.

    Args:
        sigmas: S+1 noise levels.
        schedule: which steps are full, or a rule that makes it from the sigmas.
        rule: the row of each forecast step.
        first_step: where the run starts; it is full whatever the schedule says.
        chunk: at most this many forecasts a launch (1: step by step); None composes whole segments. Smaller chunks need
            fewer slots and more passes over memory.
        check_every: of the full steps after the first, each n-th gets a `Check` where its history is long enough for a
            forecast; None checks none. The features that it reads are kept for it.

    Returns:
        The plan.

    Raises:
        ValueError: when the sigmas do not fall, the schedule is for another number of steps, a row is not finite, or
            first_step, chunk or check_every is out of range.
        TypeError: when the schedule is neither a Schedule nor a rule, or chunk or check_every no int.
    """
    levels = check_decreasing(sigmas)
    steps = len(levels) - 1
    if not isinstance(schedule, Schedule) and not callable(schedule):
        raise TypeError(f"schedule must be a Schedule or a rule that makes one, got {type(schedule).__name__}")
    resolved = schedule if isinstance(schedule, Schedule) else schedule(levels)
    if not isinstance(resolved, Schedule):
        raise TypeError(f"schedule must make a Schedule from the sigmas, got {type(resolved).__name__}")
    if resolved.num_steps != steps:
        raise ValueError(
            f"schedule must have {steps} steps (the sigmas hold {steps + 1} values), got {resolved.num_steps}"
        )
    first_step = check_int("first_step", first_step, 0)
    if first_step >= steps:
        raise ValueError(f"first_step must be in [0, {steps}), got {first_step}")
    check_count("chunk", chunk)
    check_count("check_every", check_every)
    full, rows = _resolve_rows(steps, resolved, rule, first_step)
    segments = _compose(full, rows, steps, min(chunk or MAX_OUTPUTS, MAX_OUTPUTS))
    if check_every is not None:
        segments = [
            replace(segment, check=_check_of(segment.full_step, full[:position], resolved, rule, first_step))
            if position and position % check_every == 0
            else segment
            for position, segment in enumerate(segments)
        ]
    placed, num_slots = _assign_slots(segments)
    return Plan(levels, placed, num_slots, sum(len(row.terms) for row in rows.values()), first_step)


def _resolve_rows(steps: int, schedule: Schedule, rule: RowRule, first_step: int) -> tuple[list[int], dict[int, Row]]:
    """Decide which steps are full (a row that cannot be had makes its step full) and collect the rows of the others."""
    wanted, full, rows = set(schedule.full_steps), [first_step], {}
    for step in range(first_step + 1, steps):
        row = None if step in wanted else rule(step, full)
        if row is None:
            full.append(step)
            continue
        _check_row(step, row, first_step)
        rows[step] = row
    return full, rows


def _check_row(step: int, row: Row, first_step: int) -> None:
    check_type(f"the row of step {step}", row, Row, "a Row or None")
    if not row.terms:
        raise ValueError(f"the row of step {step} must read at least one feature, got none")
    if not all(math.isfinite(value) for value in (*row.terms.values(), row.offset)):
        raise ValueError(f"the row of step {step} must be finite, got {row.terms} and offset {row.offset}")
    for source in row.terms:
        if not first_step <= step_of(source) < step:
            raise ValueError(f"the row of step {step} must read steps {first_step} to {step - 1}, got step {source}")


def _check_of(step: int, full: Sequence[int], schedule: Schedule, rule: RowRule, first_step: int) -> Check | None:
    """Return the check of a full step, None where it is full because it could not be forecast."""
    row = rule(step, full) if step in schedule.full_steps else None
    if row is None:
        return None
    _check_row(step, row, first_step)
    if len(row.terms) > MAX_INPUTS:
        raise ValueError(f"a check reads at most {MAX_INPUTS} features, got {len(row.terms)} for step {step}")
    inputs = tuple(sorted(row.terms, key=_order))
    return Check(inputs, (), tuple(row.terms[source] for source in inputs), row.offset)


def _compose(full: Sequence[int], rows: dict[int, Row], steps: int, chunk: int) -> list[Segment]:
    """Express each launch's rows over the features that are resident when it runs. No slots are assigned yet."""
    segments = []
    resident: dict[int, int] = {}  # forecast step -> the step whose tensor is its own too
    for position, full_step in enumerate(full):
        end = full[position + 1] if position + 1 < len(full) else steps
        forecasts = range(full_step + 1, end)
        chunks = [forecasts[start : start + chunk] for start in range(0, len(forecasts), chunk)]
        segments.append(Segment(full_step, {}, tuple(_compose_launch(each, rows, resident) for each in chunks)))
    return segments


def _compose_launch(steps: Sequence[int], rows: dict[int, Row], resident: dict[int, int]) -> Launch:
    """Substitute the launch's own forecasts into later rows, so that every row reads resident tensors only."""
    composed: dict[int, Row] = {}
    for step in steps:
        terms: dict[Term, float] = {}
        offset = rows[step].offset
        for source, coefficient in rows[step].terms.items():
            own = composed.get(source) if isinstance(source, int) else None
            inner = own or Row({resident.get(source, source) if isinstance(source, int) else source: 1.0})
            offset += coefficient * inner.offset
            for term, weight in inner.terms.items():
                terms[term] = terms.get(term, 0.0) + coefficient * weight
        composed[step] = Row(terms, offset)
        resident[step] = next(earlier for earlier, row in composed.items() if row == composed[step])
    distinct = [step for step in steps if resident[step] == step]
    inputs = tuple(sorted({source for step in distinct for source in composed[step].terms}, key=_order))
    if len(inputs) > MAX_INPUTS:
        raise ValueError(f"a launch reads at most {MAX_INPUTS} features, got {len(inputs)} for steps {list(steps)}")
    coefficients = tuple(tuple(composed[step].terms.get(source, 0.0) for source in inputs) for step in distinct)
    offsets = tuple(composed[step].offset for step in distinct)
    output = tuple(distinct.index(resident[step]) for step in steps)
    return Launch(tuple(steps), output, inputs, (), (), coefficients, offsets)


def _order(term: Term) -> tuple[int, str]:
    """Order terms by their steps."""
    return (term, "") if isinstance(term, int) else term


def _outputs(launch: Launch) -> list[int]:
    """Return the steps by which the tensors of a launch are known: the first that each serves."""
    return [launch.steps[launch.output.index(row)] for row in range(len(launch.coefficients))]


def _last_uses(segments: Iterable[Segment]) -> dict[Term, int]:
    """Return the last event at which each tensor is needed; pushes and launches are numbered as they happen."""
    last: dict[Term, int] = {}
    event = 0
    for segment in segments:
        if segment.check is not None:
            # It comes right after the push: both features must be there.
            last.update(dict.fromkeys((*segment.check.inputs, segment.full_step), event))
        event += 1
        for launch in segment.launches:
            # A forecast is handed out between its own launch and the next event.
            last.update(dict.fromkeys(_outputs(launch), event))
            last.update(dict.fromkeys(launch.inputs, event))
            event += 1
    return last


class _Slots:
    """Hands out slots, the lowest free one first."""

    def __init__(self) -> None:
        self.count = 0
        self._free: list[int] = []
        self._held: dict[Term, int] = {}

    def take(self, term: Term) -> int:
        """Give a term a slot."""
        if self._free:
            slot = min(self._free)
            self._free.remove(slot)
        else:
            slot = self.count
            self.count += 1
        self._held[term] = slot
        return slot

    def of(self, term: Term) -> int:
        """Return the slot of a term."""
        return self._held[term]

    def release(self, terms: Iterable[Term]) -> None:
        """Take the slots of terms back."""
        for term in terms:
            self._free.append(self._held.pop(term))

    def expired(self, last: dict[Term, int], event: int) -> list[Term]:
        """Return the terms that nothing needs at or after an event."""
        return [term for term in self._held if last[term] < event]


def _assign_slots(segments: Sequence[Segment]) -> tuple[tuple[Segment, ...], int]:
    """Assign slots by liveness. An output may take the slot of an input of the same launch that nothing needs later."""
    last, slots, event = _last_uses(segments), _Slots(), 0
    placed = []
    for segment in segments:
        slots.release(slots.expired(last, event))
        handed_in = sorted((term for term in last if step_of(term) == segment.full_step), key=_order)
        own = {term: slots.take(term) for term in handed_in}
        check = segment.check and replace(segment.check, read=tuple(map(slots.of, segment.check.inputs)))
        event += 1
        launches = []
        for launch in segment.launches:
            slots.release(slots.expired(last, event))
            read = tuple(map(slots.of, launch.inputs))
            slots.release([term for term in launch.inputs if last[term] == event])
            write = tuple(map(slots.take, _outputs(launch)))
            launches.append(replace(launch, read=read, write=write))
            event += 1
        placed.append(replace(segment, slots=own, launches=tuple(launches), check=check))
    return tuple(placed), slots.count

"""Checks and times variants: a correctness gate, samples interleaved in one process, cold caches, quantiles."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from benchmarks.clock import Clock, Run
from benchmarks.results import PEAKS, Measurement, Origin
from lesa_kernels.ops import Tolerance

COPY = "copy of the same bytes"
CAPTURED = ", captured"
"""Ends the name of a variant that is replayed as a CUDA graph."""
MOST_SETS = 128
MOST_CALLS = 1000
MOST_CAPTURED = 64
MOST_REASON = 500
NO_TIME = "no time was left for it"


def is_ours(variant: str) -> bool:
    """Whether this package computes a variant of that name."""
    return any(mark in variant for mark in ("lesa", "Triton ", "predict_l1_loss"))


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Args:
        name: what it is called.
        run: computes the outputs of input set i, a list of tensors.
        tolerance: how far its outputs may lie from the reference; None for a copy, which computes nothing.
        threads: that torch uses meanwhile; None leaves them.
        calls: that one run makes.
        capture: whether a CUDA graph can hold it: not what waits for the device.
        both_modes: whether it runs under `no_grad` as well as under `inference_mode`, without being compiled anew.
    """

    name: str
    run: Run
    tolerance: Tolerance | None
    threads: int | None = None
    calls: int = 1
    capture: bool = True
    both_modes: bool = True

    @property
    def ours(self) -> bool:
        """Whether this package computes it."""
        return is_ours(self.name)


@dataclass(frozen=True)
class Case:
    """What is measured: an op at a size.

    Args:
        op: name of the op.
        size: name of the size, with what else distinguishes the case.
        moved_bytes: bytes that must be read and written at least; None where these do not limit it.
        reference: the outputs of input set 0, in a wider dtype.
        scale: for each output the magnitude that relative errors refer to, of a shape that broadcasts.
        variants: to be timed, where bytes count a copy among them; the first one is ours.
        context: what the variants run under.
        checked: which part of an output the reference is for.
        sets: input sets that the variants rotate through.
    """

    op: str
    size: str
    moved_bytes: int | None
    reference: Sequence[Tensor]
    scale: Sequence[Tensor]
    variants: Sequence[Variant]
    context: Callable[[], AbstractContextManager[object]] = torch.inference_mode
    checked: Callable[[Tensor], Tensor] = lambda output: output
    sets: int = 1

    @property
    def title(self) -> str:
        """What tables and messages call the case."""
        return f"{self.op} at {self.size}"


@dataclass(frozen=True)
class Dropped:
    """A variant that was not timed, or with an empty name a whole case, and why.

    Args:
        op: the case's.
        size: the case's.
        variant: which one.
        dropped: the reason.
        wrong: whether its result was wrong, and not only none.
        ours: whether this package computes it.
    """

    op: str
    size: str
    variant: str
    dropped: str
    wrong: bool = False
    ours: bool = False


Drop = Callable[[Dropped], None]


@dataclass(frozen=True)
class Known:
    """What is known of a variant before it is timed: calls that fill a sample, extra bytes, a launch's microseconds."""

    calls: int
    extra_bytes: int | None = None
    host_no_grad_us: float | None = None
    host_inference_us: float | None = None


class WrongResultError(ValueError):
    """A variant computes something else than the reference."""


def sets_needed(bytes_per_set: int, cache_bytes: int) -> int:
    """How many input sets to rotate through, so that each is cold when its turn comes; a very large one always is."""
    return max(1, min(MOST_SETS, -(-4 * cache_bytes // max(bytes_per_set, 1))))


def check(case: Case, variant: Variant) -> None:
    """Refuse to time a wrong result.

    Raises:
        WrongResultError: names the variant and its error.
    """
    if variant.tolerance is None:
        variant.run(0)
        return
    # What a run leaves unwritten must not be what the run before wrote there.
    for output in variant.run(0):
        output.fill_(torch.nan)
    outputs = variant.run(0)
    for number, (got, want, scale) in enumerate(zip(outputs, case.reference, case.scale, strict=True)):
        error = (case.checked(got).to(want.dtype) - want).abs()
        allowed = variant.tolerance.absolute + variant.tolerance.relative * scale
        # A NaN compares false.
        if not bool((error <= allowed).all()):
            raise WrongResultError(
                f"{case.title}: output {number} of {variant.name} must match the reference, it is off by "
                f"{(error - allowed).max().item():.2e} more than allowed"
            )


def measure(
    case: Case, clock: Clock, repeats: int, origin: Origin, drop: Drop, deadline: float = float("inf")
) -> list[Measurement]:
    """Check a case, then time its variants in turn.

    Args:
        case: what to measure.
        clock: of the device that the case lies on.
        repeats: rounds; each takes a sample of every variant, in a rotating order.
        origin: recorded with each row.
        drop: called for each variant that computes something wrong or fails.
        deadline: of `time.perf_counter`: then baselines are dropped that were not compiled yet, and rounds end with
            the third.

    Returns:
        One row for each variant that is left.
    """
    with case.context():
        case, known = prepare(case, clock, drop, deadline)
        if not case.variants:
            return []
        calls = {name: facts.calls for name, facts in known.items()}
        warm = time.perf_counter() + clock.warm_seconds
        one_round(case, clock, calls, 0)
        while time.perf_counter() < warm:
            one_round(case, clock, calls, 0)
        rounds: list[dict[str, float]] = []
        while len(rounds) < repeats and (len(rounds) < 3 or time.perf_counter() < deadline):
            rounds.append(one_round(case, clock, calls, len(rounds) + 1))
    return rows_of(case, rounds, known, origin)


def prepare(case: Case, clock: Clock, drop: Drop, deadline: float = float("inf")) -> tuple[Case, dict[str, Known]]:
    """Check and capture the variants of a case, under its context.

    Returns:
        The case with the variants that can be timed, those that are graphs last, and by name what is known of each.
    """
    eager: list[Variant] = []
    graphs: list[Variant] = []
    known: dict[str, Known] = {}
    for variant in case.variants:
        with dropping(case.op, case.size, variant.name, drop):
            if time.perf_counter() > deadline and variant.tolerance is not None and not variant.ours:
                drop(Dropped(case.op, case.size, variant.name, NO_TIME))
                continue
            check(case, variant)
            seconds = clock.sample(variant.run, 1, 1)
            facts = Known(_calls(clock, seconds), clock.extra_bytes(variant.run), **_host_us(case, variant, clock))
            eager, known[variant.name] = [*eager, variant], facts
            name = variant.name + CAPTURED
            calls = case.sets * -(-min(MOST_CAPTURED, facts.calls) // case.sets)
            with dropping(case.op, case.size, name, drop):
                if variant.capture and (replay := clock.capture(variant.run, case.sets, calls)):
                    graph = replace(variant, name=name, run=replay, calls=calls)
                    check(case, graph)
                    graphs, known[name] = [*graphs, graph], Known(_calls(clock, clock.sample(replay, 1, 1)))
    return replace(case, variants=[*eager, *graphs]), known


@contextmanager
def dropping(op: str, size: str, variant: str, drop: Drop) -> Generator[None, None, None]:
    """Drop a variant that raises anything, or a whole case: it must not end the others."""
    try:
        yield
    except Exception as error:
        wrong, reason = isinstance(error, WrongResultError), " ".join(str(error).split())
        text = reason if wrong else f"{type(error).__name__}: {reason}"
        drop(Dropped(op, size, variant, text[:MOST_REASON], wrong, is_ours(variant)))


def _calls(clock: Clock, seconds: float) -> int:
    return max(1, min(MOST_CALLS, round(clock.sample_seconds / seconds)))


def _host_us(case: Case, variant: Variant, clock: Clock) -> dict[str, float | None]:
    """Return what launching a call costs the host in either mode; in the one that the case lacks, where it can."""
    modes = {"host_no_grad_us": torch.no_grad, "host_inference_us": torch.inference_mode}
    if case.context not in modes.values():
        return {}
    found: dict[str, float | None] = {}
    for name, mode in modes.items():
        if mode is case.context or variant.both_modes:
            with torch.inference_mode(False), mode():
                seconds = clock.host_seconds(variant.run)
            found[name] = None if seconds is None else 1e6 * seconds
    return found


def rows_of(
    case: Case, rounds: Sequence[dict[str, float]], known: Mapping[str, Known], origin: Origin
) -> list[Measurement]:
    """Make the rows of a case from what its variants took, in seconds, in each round."""
    copies = [statistics.median(times[name] for times in rounds) for name in (COPY, COPY + CAPTURED) if name in known]
    rows = []
    for variant in case.variants:
        row = row_of(
            case.op,
            case.size,
            variant.name,
            [times[variant.name] for times in rounds],
            origin,
            moved_bytes=case.moved_bytes,
            copy=min(copies, default=None),
        )
        facts = asdict(known[variant.name])
        del facts["calls"]
        rows.append(replace(row, **facts))
    return rows


def one_round(case: Case, clock: Clock, calls: Mapping[str, int], turn: int) -> dict[str, float]:
    """Take one sample of every variant, in seconds a call; the order rotates with the turn."""
    start = turn % len(case.variants)
    order = [*case.variants[start:], *case.variants[:start]]
    times, switches = {}, any(variant.threads is not None for variant in case.variants)
    for variant in order:
        with _threads(variant.threads):
            if switches:  # threads are started anew by the first call after their number changed
                variant.run(turn)
            times[variant.name] = clock.sample(variant.run, turn, calls[variant.name], case.sets) / variant.calls
    return times


@contextmanager
def _threads(count: int | None) -> Generator[None, None, None]:
    before = torch.get_num_threads()
    if count is None or count == before:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the 20 % and the 80 % quantile, the last two as samples that were taken."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return statistics.median(values), ordered[int(0.2 * last)], ordered[-(-8 * last // 10)]


def row_of(
    op: str,
    size: str,
    variant: str,
    values: list[float],
    origin: Origin,
    *,
    moved_bytes: int | None = None,
    copy: float | None = None,
) -> Measurement:
    """Make a row of samples in seconds; `copy` is the median of a copy in the same run."""
    median, p20, p80 = quantiles(values)
    peak = PEAKS.get(origin.device)
    return Measurement(
        op=op,
        size=size,
        variant=variant,
        median_s=median,
        p20_s=p20,
        p80_s=p80,
        gb_per_s=None if moved_bytes is None else moved_bytes / median / 1e9,
        share_of_copy=None if copy is None else copy / median,
        extra_bytes=None,
        share_of_peak=None if moved_bytes is None or peak is None else moved_bytes / median / peak,
        **origin._asdict(),
    )

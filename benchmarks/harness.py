"""Measuring: a correctness gate, variants interleaved in one process, cold caches, quantiles, share of a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.clock import Clock, Run
from benchmarks.results import Measurement, Origin
from lesa_kernels.reference import Tolerance

COPY = "copy of the same bytes"
MOST_SETS = 128
MOST_CALLS = 1000


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Args:
        name: what it is called.
        run: computes the outputs of input set i, a list of tensors.
        tolerance: how far its outputs may lie from the reference; None for a copy, which computes nothing.
        threads: that torch uses meanwhile; None leaves them.
    """

    name: str
    run: Run
    tolerance: Tolerance | None
    threads: int | None = None


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
    """

    op: str
    size: str
    moved_bytes: int | None
    reference: Sequence[Tensor]
    scale: Sequence[Tensor]
    variants: Sequence[Variant]
    context: Callable[[], AbstractContextManager[object]] = torch.inference_mode
    checked: Callable[[Tensor], Tensor] = lambda output: output

    @property
    def title(self) -> str:
        """What tables and messages call the case."""
        return f"{self.op} at {self.size}"


def sets_needed(bytes_per_set: int, cache_bytes: int) -> int:
    """How many input sets to rotate through, so that each is cold when its turn comes; a very large one always is."""
    return max(1, min(MOST_SETS, -(-4 * cache_bytes // max(bytes_per_set, 1))))


def check(case: Case) -> None:
    """Refuse to time a wrong result.

    Raises:
        ValueError: names the variant and its error.
    """
    for variant in case.variants:
        if variant.tolerance is None:
            continue
        outputs = variant.run(0)
        for number, (got, want, scale) in enumerate(zip(outputs, case.reference, case.scale, strict=True)):
            error = (case.checked(got).to(want.dtype) - want).abs()
            allowed = variant.tolerance.absolute + variant.tolerance.relative * scale
            # A NaN compares false.
            if not bool((error <= allowed).all()):
                raise ValueError(
                    f"{case.title}: output {number} of {variant.name} must match the reference, it is off by "
                    f"{(error - allowed).max().item():.2e} more than allowed"
                )


def measure(case: Case, clock: Clock, repeats: int, origin: Origin) -> list[Measurement]:
    """Check a case, then time its variants in turn.

    Args:
        case: what to measure.
        clock: of the device that the case lies on.
        repeats: rounds; each takes a sample of every variant, in a rotating order.
        origin: recorded with each row.

    Returns:
        One row a variant.

    Raises:
        ValueError: when a variant computes something else than the reference.
    """
    with case.context():
        check(case)
        extra = {variant.name: clock.extra_bytes(variant.run) for variant in case.variants}
        calls = calls_of(case, clock)
        deadline = time.perf_counter() + clock.warm_seconds
        one_round(case, clock, calls, 0)
        while time.perf_counter() < deadline:
            one_round(case, clock, calls, 0)
        rounds = [one_round(case, clock, calls, turn) for turn in range(1, repeats + 1)]
    return rows_of(case, rounds, extra, origin)


def rows_of(case: Case, rounds: Sequence[dict[str, float]], extra: dict[str, int], origin: Origin) -> list[Measurement]:
    """Make the rows of a case from what its variants took, in seconds, in each round."""
    copies = [times[COPY] for times in rounds if COPY in times]
    copy = statistics.median(copies) if copies else None
    names = [variant.name for variant in case.variants]
    return [
        row_of(
            case.op,
            case.size,
            name,
            [times[name] for times in rounds],
            origin,
            moved_bytes=case.moved_bytes,
            copy=copy,
            extra_bytes=extra[name],
        )
        for name in names
    ]


def calls_of(case: Case, clock: Clock) -> dict[str, int]:
    """Return how many calls of each variant fill a sample; the check has set up whatever the first call sets up."""
    seconds = {variant.name: clock.sample(variant.run, 1, 1) for variant in case.variants}
    return {name: max(1, min(MOST_CALLS, round(clock.sample_seconds / one))) for name, one in seconds.items()}


def one_round(case: Case, clock: Clock, calls: dict[str, int], turn: int) -> dict[str, float]:
    """Take one sample of every variant; the order rotates with the turn."""
    start = turn % len(case.variants)
    order = [*case.variants[start:], *case.variants[:start]]
    times, switches = {}, any(variant.threads is not None for variant in case.variants)
    for variant in order:
        with _threads(variant.threads):
            if switches:  # threads are started anew by the first call after their number changed
                variant.run(turn)
            times[variant.name] = clock.sample(variant.run, turn, calls[variant.name])
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
    extra_bytes: int | None = None,
) -> Measurement:
    """Make a row of samples in seconds; `copy` is the median of a copy in the same run."""
    median, p20, p80 = quantiles(values)
    return Measurement(
        op=op,
        size=size,
        variant=variant,
        median_s=median,
        p20_s=p20,
        p80_s=p80,
        gb_per_s=None if moved_bytes is None else moved_bytes / median / 1e9,
        share_of_copy=None if copy is None else copy / median,
        extra_bytes=extra_bytes,
        **origin._asdict(),
    )

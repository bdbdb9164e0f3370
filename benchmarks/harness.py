"""Measuring: a correctness gate, variants interleaved in one process, cold caches, quantiles, share of a copy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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
    """

    name: str
    run: Run
    tolerance: Tolerance | None


@dataclass(frozen=True)
class Case:
    """What is measured: an op at a size.

    Args:
        op: name of the op.
        size: name of the size, with what else distinguishes the case.
        moved_bytes: bytes that must be read and written at least.
        reference: the outputs of input set 0, in a wider dtype.
        scale: for each output the magnitude that relative errors refer to, of a shape that broadcasts.
        variants: to be timed, the copy among them; the first one is ours.
        context: what the variants run under.
    """

    op: str
    size: str
    moved_bytes: int
    reference: Sequence[Tensor]
    scale: Sequence[Tensor]
    variants: Sequence[Variant]
    context: Callable[[], AbstractContextManager[object]] = torch.inference_mode

    @property
    def title(self) -> str:
        """What tables and messages call the case."""
        return f"{self.op} at {self.size}"


def sets_needed(bytes_per_set: int, cache_bytes: int) -> int:
    """How many input sets to rotate through, so that each is cold when its turn comes."""
    return max(2, min(MOST_SETS, -(-4 * cache_bytes // max(bytes_per_set, 1))))


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
            error = (got.to(want.dtype) - want).abs()
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
        calls = {variant.name: _calls(variant, clock) for variant in case.variants}
        deadline = time.perf_counter() + clock.warm_seconds
        _round(case, clock, calls, 0)
        while time.perf_counter() < deadline:
            _round(case, clock, calls, 0)
        rounds = [_round(case, clock, calls, turn) for turn in range(1, repeats + 1)]
    copy = statistics.median(times[COPY] for times in rounds)
    return [
        _row(case, variant.name, [times[variant.name] for times in rounds], copy, extra[variant.name], origin)
        for variant in case.variants
    ]


def _calls(variant: Variant, clock: Clock) -> int:
    """How many calls fill a sample; the check has set up whatever the first call sets up."""
    return max(1, min(MOST_CALLS, round(clock.sample_seconds / clock.sample(variant.run, 1, 1))))


def _round(case: Case, clock: Clock, calls: dict[str, int], turn: int) -> dict[str, float]:
    """Take one sample of every variant; the order rotates with the turn."""
    start = turn % len(case.variants)
    order = [*case.variants[start:], *case.variants[:start]]
    return {variant.name: clock.sample(variant.run, turn, calls[variant.name]) for variant in order}


def _row(
    case: Case, name: str, values: list[float], copy: float, extra_bytes: int | None, origin: Origin
) -> Measurement:
    ordered = sorted(values)
    median = statistics.median(values)
    return Measurement(
        op=case.op,
        size=case.size,
        variant=name,
        median_s=median,
        p20_s=ordered[int(0.2 * (len(ordered) - 1))],
        p80_s=ordered[-(-8 * (len(ordered) - 1) // 10)],
        gb_per_s=case.moved_bytes / median / 1e9,
        share_of_copy=copy / median,
        extra_bytes=extra_bytes,
        **origin._asdict(),
    )

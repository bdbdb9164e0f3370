"""Lists the targets of the kernels, and judges a run's results by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.table import Table

from benchmarks.cases import (
    ADDITION,
    ALL_THREADS,
    COMPILED,
    COMPILED_ROWS,
    COMPILED_STEP,
    EAGER,
    EAGER_STEP,
    INTO,
    KAN_WIDTHS,
    ONE_THREAD,
    TUNED,
)
from benchmarks.harness import CAPTURED, COPY
from benchmarks.results import Measurement
from benchmarks.suite import FLUX, KAN_ROWS, QWEN, RESIDENT, TINY


@dataclass(frozen=True)
class Target:
    """Two medians of one case, compared.

    Args:
        op: of the case.
        size: of the case.
        ours: the variant that has to be fast.
        against: the variant it is compared with; where it was also tuned, or captured, the fastest counts.
        at_least: how many times as long that one has to take; None where microseconds count.
        within_us: how many microseconds more ours may take.
    """

    op: str
    size: str
    ours: str
    against: str
    at_least: float | None = None
    within_us: float | None = None

    def measured(self, ours: float, against: float) -> float:
        """Return what is compared, from the seconds of both: a ratio, or microseconds."""
        return against / ours if self.at_least is not None else 1e6 * (ours - against)

    def met_by(self, measured: float) -> bool:
        """Whether that is enough."""
        if self.at_least is not None:
            return measured >= self.at_least
        return self.within_us is not None and measured <= self.within_us

    @property
    def wanted(self) -> str:
        """What is asked for, as text."""
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= +{self.within_us:g} us"


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured: a ratio or microseconds, None where one of the variants was not.

    Args:
        target: what is wanted.
        measured: what came.
        against: the variant that counted.
    """

    target: Target
    measured: float | None
    against: str

    @property
    def word(self) -> str:
        """How the report says it."""
        if self.measured is None:
            return "not measured"
        return "met" if self.target.met_by(self.measured) else "NOT MET"

    @property
    def line(self) -> str:
        """The verdict as one line of text."""
        target = self.target
        measured = "-" if self.measured is None else f"{self.measured:.2f}"
        case = f"{target.op}, {target.size}: {self.against} / {target.ours}"
        return f"{self.word}: {case} {target.wanted}, got {measured}"


def targets() -> Iterator[Target]:
    """Yield the targets on an H100: K = 8, M = 6, bfloat16, each variant captured in a CUDA graph."""
    for target in _eager_targets():
        yield replace(target, ours=target.ours + CAPTURED, against=target.against + CAPTURED)


def _eager_targets() -> Iterator[Target]:
    rows = "K=8, M=6, bfloat16"
    for name in (FLUX, QWEN):
        size = f"{name}, K=8, bfloat16"
        yield Target("predict", size, "lesa::predict", COPY, 0.90)
        yield Target("predict", size, "lesa::predict", EAGER, 8)
        yield Target("predict", size, "lesa::predict", COMPILED, 1)
        yield Target("forecast", f"{name}, {rows}", "lesa::forecast", COPY, 0.90)
        yield Target("forecast", f"{name}, {rows}", "lesa::forecast_into", COPY, 0.90)
        yield Target("forecast", f"{name}, {rows}", "lesa::forecast", f"6 x {EAGER}", 8)
        yield Target("forecast", f"{name}, {rows}", "lesa::forecast", COMPILED_ROWS, 1)
        yield Target("forecast", f"{name}, {rows}", "lesa::forecast", "6 x lesa::predict", 3)
        yield Target("predict_l1", size, "lesa::predict_l1", COPY, 0.85)
        yield Target("predict_l1", size, "lesa::predict_l1", EAGER_STEP, 10)
    for count in KAN_ROWS:
        size = f"{'-'.join(map(str, KAN_WIDTHS))}, {count} rows, forward and backward"
        yield Target("kan_linear", size, "lesa::kan_linear and autograd", EAGER_STEP, 10)


def cpu_targets() -> Iterator[Target]:
    """Yield the targets on two cores with AVX-512: K = 8, bfloat16 where nothing else is said."""
    size, rows = f"{FLUX}, K=8, bfloat16", f"{FLUX}, K=8, M=6, bfloat16"
    yield Target("predict", size, "lesa::predict", EAGER, 30)
    yield Target("predict", size, "lesa::predict", COMPILED, 1.25)
    yield Target("predict", size, INTO, COPY, 1)
    yield Target("forecast", rows, "lesa::forecast_into", "6 x lesa::forecast_into of one", 3)
    yield Target("predict", f"{TINY}, K=8, float32", "lesa::predict", ADDITION, within_us=6)
    yield Target("threads", f"{RESIDENT}, K=8, bfloat16, in the cache", ALL_THREADS, ONE_THREAD, 1.7)
    yield Target("predict_l1", f"{FLUX}, K=8, bfloat16", "lesa::predict_l1", EAGER_STEP, 40)
    for count in KAN_ROWS:
        size = f"{'-'.join(map(str, KAN_WIDTHS))}, {count} rows, forward and backward"
        yield Target("kan_linear", size, "lesa::kan_linear and autograd", COMPILED_STEP, 1)


def judge(rows: Sequence[Measurement], wanted: Iterable[Target] | None = None) -> list[Verdict]:
    """Compare the results of one run with targets, None for those of a GPU."""
    medians = {(row.op, row.size, row.variant): row.median_s for row in rows}
    verdicts = []
    for target in targets() if wanted is None else wanted:
        plain = target.against.removesuffix(CAPTURED)
        names = (target.ours, target.against, plain, plain + TUNED, plain + TUNED + CAPTURED)
        found = {name: medians.get((target.op, target.size, name)) for name in names}
        ours, rivals = found.pop(target.ours), {name: seconds for name, seconds in found.items() if seconds}
        against = min(rivals, key=rivals.__getitem__, default=target.against)
        measured = target.measured(ours, rivals[against]) if ours and rivals else None
        verdicts.append(Verdict(target, measured, against))
    return verdicts


def table(verdicts: Sequence[Verdict]) -> Table:
    """Lay out the verdicts."""
    out = Table(
        title="Targets: the other's time as a multiple of ours, or what ours takes beyond it",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("case", "ours", "against"):
        out.add_column(name)
    for name in ("target", "measured", ""):
        out.add_column(name, justify="right")
    for verdict in verdicts:
        target = verdict.target
        measured = "" if verdict.measured is None else f"{verdict.measured:.2f}"
        case = f"{target.op}, {target.size}"
        out.add_row(case, target.ours, verdict.against, target.wanted, measured, verdict.word)
    return out

"""What the kernels have to reach, and whether a run's results do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from benchmarks.cases import COMPILED, COMPILED_ROWS, EAGER
from benchmarks.harness import COPY
from benchmarks.results import Measurement
from benchmarks.suite import FLUX, KAN_ROWS, QWEN
from benchmarks.training import COMPILED_STEP, EAGER_STEP, KAN_WIDTHS


@dataclass(frozen=True)
class Target:
    """A ratio of two medians of one case.

    Args:
        op: of the case.
        size: of the case.
        ours: the variant that has to be fast.
        against: the variant it is compared with.
        at_least: how many times as long that one has to take.
    """

    op: str
    size: str
    ours: str
    against: str
    at_least: float


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured: `ratio` is None where one of the variants was not."""

    target: Target
    ratio: float | None

    @property
    def word(self) -> str:
        """How the report says it."""
        if self.ratio is None:
            return "not measured"
        return "met" if self.ratio >= self.target.at_least else "NOT MET"

    @property
    def line(self) -> str:
        """The verdict as one line of text."""
        target = self.target
        measured = "-" if self.ratio is None else f"{self.ratio:.2f}"
        case = f"{target.op}, {target.size}: {target.against} / {target.ours}"
        return f"{self.word}: {case} >= {target.at_least:g}, got {measured}"


def targets() -> Iterator[Target]:
    """Yield the targets on an H100: K = 8, M = 6, bfloat16."""
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
    """Yield the targets of training on a CPU: K = 8, bfloat16."""
    yield Target("predict_l1", f"{FLUX}, K=8, bfloat16", "lesa::predict_l1", EAGER_STEP, 40)
    for count in KAN_ROWS:
        size = f"{'-'.join(map(str, KAN_WIDTHS))}, {count} rows, forward and backward"
        yield Target("kan_linear", size, "lesa::kan_linear and autograd", COMPILED_STEP, 1)


def judge(rows: Sequence[Measurement], wanted: Iterable[Target] | None = None) -> list[Verdict]:
    """Compare the results of one run with targets, None for those of a GPU."""
    medians = {(row.op, row.size, row.variant): row.median_s for row in rows}
    verdicts = []
    for target in targets() if wanted is None else wanted:
        ours = medians.get((target.op, target.size, target.ours))
        against = medians.get((target.op, target.size, target.against))
        verdicts.append(Verdict(target, against / ours if ours and against else None))
    return verdicts


def table(verdicts: Sequence[Verdict]) -> Table:
    """Lay out the verdicts."""
    out = Table(title="Targets: the other's time as a multiple of ours", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("case", "ours", "against"):
        out.add_column(name)
    for name in ("target", "measured", ""):
        out.add_column(name, justify="right")
    for verdict in verdicts:
        target = verdict.target
        measured = "" if verdict.ratio is None else f"{verdict.ratio:.2f}"
        case = f"{target.op}, {target.size}"
        out.add_row(case, target.ours, target.against, f"{target.at_least:.2f}", measured, verdict.word)
    return out

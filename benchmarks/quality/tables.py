"""Reads and writes the rows of the comparison, and makes tables, verdicts and the plot from them."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks.quality.methods import BASHFORTH, LESA, LESA_TAIL, LESA_TUNED, TAIL, TAYLOR, UNIFORM
from lesa_kernels.files import replacing

README_METHODS = {
    LESA_TAIL: "`lesa calibrate --form lesa`",
    TAIL: "`lesa calibrate`",
    BASHFORTH: "Adams-Bashforth 2: a solver, no cache",
    TAYLOR: "TaylorSeer 2, sigma: no training",
    LESA_TUNED: "`lesa train`",
}
MAIN = (LESA_TAIL, TAIL, TAYLOR, BASHFORTH, LESA_TUNED, LESA)


@dataclass(frozen=True)
class Row:
    """One method on one trained model.

    Args:
        data: the data set.
        seed: of the model's training.
        calls: of the blocks.
        method: its name.
        schedule: what its schedule is called.
        full_steps: the steps on which the blocks ran, separated by blanks.
        psnr: dB against the samples with all steps in full, mean over unseen samples.
        psnr_error: its standard error.
        psnr_converged: dB against converged samples.
        samples: how many.
        device: where it was measured.
        torch: version.
        commit: of this repository.
        date: of the run.
        command: that measured it.
    """

    data: str
    seed: int
    calls: int
    method: str
    schedule: str
    full_steps: str
    psnr: float
    psnr_error: float
    psnr_converged: float
    samples: int
    device: str
    torch: str
    commit: str
    date: str
    command: str


def load(file: Path) -> list[Row]:
    """Read rows; none where there is no file."""
    if not file.is_file():
        return []
    kinds = {"seed": int, "calls": int, "samples": int, "psnr": float, "psnr_error": float, "psnr_converged": float}
    with file.open(newline="") as lines:
        return [Row(**{key: kinds.get(key, str)(value) for key, value in row.items()}) for row in csv.DictReader(lines)]


def save(rows: Sequence[Row], file: Path) -> None:
    """Write all rows at once, so that a run that is stopped leaves whole comparisons."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as unfinished, unfinished.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


@dataclass(frozen=True)
class Line:
    """A method over the trained models of a data set: mean, lowest and highest PSNR in dB."""

    data: str
    calls: int
    method: str
    schedule: str
    psnr: float
    lowest: float
    highest: float
    converged: float
    models: int


def lines(rows: Sequence[Row]) -> list[Line]:
    """Put the models of a data set together; best method first."""
    groups: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.data, row.calls, row.method, row.schedule), []).append(row)
    found = [
        Line(
            *key,
            psnr=statistics.mean(row.psnr for row in group),
            lowest=min(row.psnr for row in group),
            highest=max(row.psnr for row in group),
            converged=statistics.mean(row.psnr_converged for row in group),
            models=len(group),
        )
        for key, group in groups.items()
    ]
    return sorted(found, key=lambda line: (line.data, -line.calls, -line.psnr))


def table(found: Sequence[Line], data: str, calls: int) -> Table:
    """Lay out the methods at one number of calls."""
    chosen = [line for line in found if (line.data, line.calls) == (data, calls)]
    models = max((line.models for line in chosen), default=0)
    out = Table(title=f"{data}, {calls} calls of the blocks, {models} trained models", box=box.SIMPLE_HEAD)
    for name in ("method", "full steps", "PSNR, dB", "lowest", "highest", "to converged"):
        out.add_column(name, justify="left" if name in ("method", "full steps") else "right", no_wrap=True)
    for line in chosen:
        figures = (line.psnr, line.lowest, line.highest, line.converged)
        style = "bold" if line.method in (TAIL, LESA_TAIL) else ""
        out.add_row(line.method, line.schedule, *(f"{figure:.1f}" for figure in figures), style=style)
    return out


@dataclass(frozen=True)
class Target:
    """A difference that is wanted, model by model: our best against another method.

    Args:
        name: what is compared.
        ours: methods, of which the best counts.
        rival: the other method.
        required_db: the difference that is wanted, dB.
        schedule: the other method's; None for the best of all that were tried.
    """

    name: str
    ours: tuple[str, ...]
    rival: str
    required_db: float
    schedule: str | None = None


LEARNED = (TAIL, LESA_TAIL, LESA_TUNED)
TARGETS = (
    Target("best learned over TaylorSeer in sigma, best schedule of each", LEARNED, TAYLOR, 2.0),
    Target("best learned over Adams-Bashforth uniform in sigma", LEARNED, BASHFORTH, 6.0, UNIFORM),
    Target("best learned over Adams-Bashforth, best schedule of each", LEARNED, BASHFORTH, 6.0),
    Target("LESA's form over its published recipe", (LESA_TAIL, LESA_TUNED), LESA, 8.0),
)


@dataclass(frozen=True)
class Verdict:
    """What came of a target: differences in dB, one for each trained model."""

    data: str
    calls: int
    target: Target
    differences: tuple[float, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """As a line of a table: data, calls, target, asked, measured, and whether it was met by the mean."""
        mean = statistics.mean(self.differences)
        spread = f"{mean:.1f} ({min(self.differences):.1f} to {max(self.differences):.1f})"
        word = "met" if mean >= self.target.required_db else "NOT MET"
        return self.data, str(self.calls), self.target.name, f"{self.target.required_db:.0f}", spread, word


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Compare with the targets on each model."""
    found = []
    for data, calls in sorted({(row.data, row.calls) for row in rows}, key=lambda key: (key[0], -key[1])):
        seeds = sorted({row.seed for row in rows if (row.data, row.calls) == (data, calls)})
        for target in TARGETS:
            differences = []
            for seed in seeds:
                own = [row for row in rows if (row.data, row.calls, row.seed) == (data, calls, seed)]
                ours = [row.psnr for row in own if row.method in target.ours]
                rival = [
                    row.psnr for row in own if row.method == target.rival and target.schedule in (None, row.schedule)
                ]
                if ours and rival:
                    differences.append(max(ours) - max(rival))
            if differences:
                found.append(Verdict(data, calls, target, tuple(differences)))
    return found


VERDICT_COLUMNS = ("data", "calls", "target", "asked, dB", "measured, dB", "")


def verdict_table(found: Sequence[Verdict]) -> Table:
    """Lay out the verdicts."""
    out = Table(title="Targets: differences, mean over models (lowest to highest)", box=box.SIMPLE_HEAD)
    for name in VERDICT_COLUMNS:
        out.add_column(name)
    for verdict in found:
        out.add_row(*verdict.cells)
    return out


def markdown(rows: Sequence[Row]) -> str:
    """Make the tables of the page: methods at their best schedules, the main ones at all, and the targets."""
    found = lines(rows)
    parts = []
    for data in sorted({line.data for line in found}):
        own = [line for line in found if line.data == data]
        calls = sorted({line.calls for line in own}, reverse=True)
        models = "/".join(str(max(line.models for line in own if line.calls == count)) for count in calls)
        heads = [f"{count} calls" for count in calls]
        best: dict[str, dict[int, Line]] = {}
        by_schedule: dict[tuple[str, str], dict[int, Line]] = {}
        for line in own:
            # Lines come best first.
            best.setdefault(line.method, {}).setdefault(line.calls, line)
            if line.method in MAIN:
                by_schedule.setdefault((line.method, line.schedule), {})[line.calls] = line
        parts += [
            f"**{data}**, {models} trained models, dB: mean (lowest to highest), each method's best schedule:",
            _grid(["method", *heads], [[name, *_cells(of, calls)] for name, of in best.items()]),
            f"**{data}**, the same by schedule:",
            _grid(
                ["method", "full steps", *heads],
                [
                    [*key, *_cells(by_schedule[key], calls)]
                    for key in sorted(by_schedule, key=lambda key: MAIN.index(key[0]))
                ],
            ),
        ]
    parts += ["Targets:", _grid(list(VERDICT_COLUMNS), [list(verdict.cells) for verdict in verdicts(rows)])]
    return "\n\n".join(parts)


def readme_markdown(rows: Sequence[Row]) -> str:
    """Make the README's table: what most would choose among, on MNIST."""
    found = [line for line in lines(rows) if line.data == "mnist"]
    calls = sorted({line.calls for line in found}, reverse=True)
    body = []
    for method, name in README_METHODS.items():
        best = [max(line.psnr for line in found if (line.method, line.calls) == (method, count)) for count in calls]
        body.append([name, *(f"{psnr:.1f}" for psnr in best)])
    return _grid(["method", *(f"{count} calls" for count in calls)], body)


def _cells(of: Mapping[int, Line], calls: Sequence[int]) -> list[str]:
    """Return mean and range at each number of calls."""
    return [
        f"{of[count].psnr:.1f} ({of[count].lowest:.1f} to {of[count].highest:.1f})" if count in of else ""
        for count in calls
    ]


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Lay out a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def draw(found: Sequence[Line], path: Path) -> None:
    """Draw PSNR against calls, a panel a data set: each method at its best schedule, with the spread over models."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = sorted({line.data for line in found})
    figure = Figure(figsize=(5.5 * len(names), 5.0), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    methods = sorted({line.method for line in found})
    colors = colormaps["tab20"]
    for panel, data in zip(panels, names, strict=True):
        for index, method in enumerate(methods):
            best: dict[int, Line] = {}
            for line in found:
                if (line.data, line.method) == (data, method) and line.psnr > getattr(
                    best.get(line.calls), "psnr", float("-inf")
                ):
                    best[line.calls] = line
            calls = sorted(best)
            middle = [best[count].psnr for count in calls]
            spread = [[best[c].psnr - best[c].lowest for c in calls], [best[c].highest - best[c].psnr for c in calls]]
            style = {"linewidth": 2.5, "zorder": 3} if method in (TAIL, LESA_TAIL) else {"linewidth": 1.0}
            panel.errorbar(
                calls, middle, spread, marker="o", capsize=3, color=colors(index % colors.N), label=method, **style
            )
        panel.set(title=data, xlabel="calls of the blocks (of 50 steps)", ylabel="PSNR against all 50 calls, dB")
        panel.set_xticks(sorted({line.calls for line in found if line.data == data}))
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(names), fontsize=7)
    figure.suptitle("each method at its best schedule; bars: lowest and highest of the trained models", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

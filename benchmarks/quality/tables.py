"""Reads and writes the rows of the comparison, and makes tables, verdicts and the plot from them."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich import box
from rich.table import Table

from benchmarks.quality.methods import (
    BASHFORTH,
    EULER,
    LESA,
    LESA_TUNED,
    METHODS,
    SOLVER,
    SOLVER_FEW,
    SOLVER_MANY,
)
from lesa_kernels.files import replacing

DEFAULT, BEST = "default", "best"
"""Schedules: a method's own, and the best that a search on the first model found."""
SEARCHED_SEED = 0
README_METHODS = {
    SOLVER: "`lesa calibrate`: the learned solver",
    BASHFORTH: "Adams-Bashforth 2: a solver, no cache",
    "TaylorSeer 1, sigma": "TaylorSeer 1, sigma: what `lesa.enable` takes without a predictor",
    "Spectrum": "Spectrum",
    LESA: "`lesa train --recipe published`: LESA as published",
}
DRAWN = (SOLVER, BASHFORTH, EULER, "TaylorSeer 2, sigma", "Spectrum", LESA_TUNED, LESA, "reuse")


@dataclass(frozen=True)
class Row:
    """One method on one trained model.

    Args:
        data: the data set.
        seed: of the model's training.
        calls: of the blocks.
        method: its name.
        schedule: DEFAULT or BEST.
        full_steps: the steps on which the blocks ran, separated by blanks.
        psnr: dB against the samples with all steps in full, mean over unseen samples.
        psnr_error: its standard error.
        ssim: against the same.
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
    ssim: float
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
    kinds = {"int": int, "float": float, "str": str}
    types = {field.name: kinds[str(field.type)] for field in fields(Row)}
    with file.open(newline="") as lines:
        return [Row(**{key: types[key](value) for key, value in row.items()}) for row in csv.DictReader(lines)]


def save(rows: Sequence[Row], file: Path) -> None:
    """Write all rows at once, in order, so that a run that is stopped leaves whole ones."""
    file.parent.mkdir(parents=True, exist_ok=True)
    ordered = sorted(rows, key=lambda row: (row.data, row.seed, -row.calls, row.method, row.schedule))
    with replacing(file) as unfinished, unfinished.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in ordered)


@dataclass(frozen=True)
class Line:
    """A method at a schedule over the trained models of a data set; at a searched one, those it was not searched on.

    `psnrs` are by seed; `converged` and `ssim` are means.
    """

    data: str
    calls: int
    method: str
    schedule: str
    psnrs: dict[int, float]
    ssim: float
    converged: float

    @property
    def psnr(self) -> float:
        """Mean over models, dB."""
        return statistics.mean(self.psnrs.values())


def lines(rows: Iterable[Row]) -> list[Line]:
    """Put the models of a data set together; best first."""
    groups: dict[tuple[str, int, str, str], list[Row]] = {}
    for row in rows:
        if row.schedule == DEFAULT or row.seed != SEARCHED_SEED:
            groups.setdefault((row.data, row.calls, row.method, row.schedule), []).append(row)
    found = [
        Line(
            *key,
            psnrs={row.seed: row.psnr for row in group},
            ssim=statistics.mean(row.ssim for row in group),
            converged=statistics.mean(row.psnr_converged for row in group),
        )
        for key, group in groups.items()
    ]
    return sorted(found, key=lambda line: (line.data, -line.calls, -line.psnr))


def table(found: Sequence[Line], data: str, calls: int) -> Table:
    """Lay out the methods at one number of calls."""
    out = Table(title=f"{data}, {calls} calls of the blocks", box=box.SIMPLE_HEAD)
    for name in ("method", "schedule", "PSNR, dB", "lowest", "highest", "SSIM", "to converged", "models"):
        out.add_column(name, justify="left" if name in ("method", "schedule") else "right", no_wrap=True)
    for line in found:
        if (line.data, line.calls) == (data, calls):
            values = line.psnrs.values()
            figures = [f"{value:.1f}" for value in (line.psnr, min(values), max(values))]
            style = "bold" if line.method == SOLVER else ""
            out.add_row(
                line.method,
                line.schedule,
                *figures,
                f"{line.ssim:.4f}",
                f"{line.converged:.1f}",
                str(len(values)),
                style=style,
            )
    return out


@dataclass(frozen=True)
class Target:
    """A difference that is wanted: the best of some methods over the best of others, each at its best schedule.

    Args:
        name: what is compared.
        ours: methods, of which the one with the best mean counts.
        rivals: likewise.
        required_db: the difference that is wanted, dB, by calls.
    """

    name: str
    ours: tuple[str, ...]
    rivals: tuple[str, ...]
    required_db: dict[int, float]


def _of(*kinds: str) -> tuple[str, ...]:
    return tuple(name for name, method in METHODS.items() if method.kind in kinds)


_LEARNED = _of("calibrated", "trained")
_MARGIN = {10: 3.0, 8: 3.0, 6: 1.5}
TARGETS = (
    Target(
        "best predictor over the best that needs no training",
        _of("calibrated", "trained"),
        _of("training-free"),
        _MARGIN,
    ),
    Target("best predictor over the best solver without a cache", _of("calibrated", "trained"), _of("solver"), _MARGIN),
    Target("fitted to 8 runs over fitted to 96", (SOLVER_FEW,), (SOLVER_MANY,), {10: -1.5, 8: -1.5, 6: -1.5}),
)


@dataclass(frozen=True)
class Verdict:
    """What came of a target: differences in dB, one for each trained model."""

    data: str
    calls: int
    target: Target
    best: Line
    rival: Line
    differences: tuple[float, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """As a line of a table: data, calls, target, the two, asked, measured, and whether it was met by the mean."""
        mean, required = statistics.mean(self.differences), self.target.required_db[self.calls]
        spread = f"{mean:.1f} ({min(self.differences):.1f} to {max(self.differences):.1f})"
        pair = f"{self.best.method} / {self.rival.method}"
        return (
            self.data,
            str(self.calls),
            self.target.name,
            pair,
            f"{required:g}",
            spread,
            "met" if mean >= required else "NOT MET",
        )


VERDICT_COLUMNS = ("data", "calls", "target", "compared", "asked, dB", "measured, dB", "")


def verdicts(rows: Iterable[Row]) -> list[Verdict]:
    """Compare with the targets, on the models that no schedule was searched on."""
    found = []
    every = lines(row for row in rows if row.seed != SEARCHED_SEED)
    for data, calls in sorted({(line.data, line.calls) for line in every}, key=lambda key: (key[0], -key[1])):
        for target in TARGETS:
            own = [line for line in every if (line.data, line.calls) == (data, calls)]
            # Lines come best first.
            best = next((line for line in own if line.method in target.ours), None)
            rival = next((line for line in own if line.method in target.rivals), None)
            if best is None or rival is None or calls not in target.required_db:
                continue
            seeds = sorted(best.psnrs.keys() & rival.psnrs.keys())
            if seeds:
                differences = tuple(best.psnrs[seed] - rival.psnrs[seed] for seed in seeds)
                found.append(Verdict(data, calls, target, best, rival, differences))
    return found


def verdict_table(found: Sequence[Verdict]) -> Table:
    """Lay out the verdicts."""
    out = Table(title="Targets: differences, mean over models (lowest to highest)", box=box.SIMPLE_HEAD)
    for name in VERDICT_COLUMNS:
        out.add_column(name)
    for verdict in found:
        out.add_row(*verdict.cells)
    return out


def markdown(rows: Sequence[Row]) -> str:
    """Make the tables of the page: every method by its schedules, and the targets."""
    found = lines(rows)
    parts = []
    for data in sorted({line.data for line in found}):
        own = [line for line in found if line.data == data]
        calls = sorted({line.calls for line in own}, reverse=True)
        seeds = f"models of seeds {', '.join(map(str, sorted({row.seed for row in rows if row.data == data})))}."
        by_method: dict[str, dict[tuple[int, str], Line]] = {}
        for line in own:
            by_method.setdefault(line.method, {})[line.calls, line.schedule] = line
        heads = [f"{count} calls, {name}" for count in calls for name in (DEFAULT, BEST)]
        ranked = sorted(by_method, key=lambda name: -statistics.mean(line.psnr for line in by_method[name].values()))
        body = [
            [name, *(_cell(by_method[name].get((count, kind))) for count in calls for kind in (DEFAULT, BEST))]
            for name in ranked
        ]
        fidelity = [[name, *(_fidelity(_best(by_method[name], count)) for count in calls)] for name in ranked]
        parts += [
            f"**{data}**, {seeds} PSNR in dB against all calls, mean (lowest to highest): by default over all models, "
            "at the best schedule over those that it was not searched on:",
            _grid(["method", *heads], body),
            f"**{data}**, at the better schedule: SSIM against all calls, and PSNR in dB against a converged run:",
            _grid(["method", *(f"{count} calls" for count in calls)], fidelity),
        ]
    parts += ["Targets:", _grid(list(VERDICT_COLUMNS), [list(verdict.cells) for verdict in verdicts(rows)])]
    return "\n\n".join(parts)


def readme_markdown(rows: Sequence[Row]) -> str:
    """Make the README's table: what most would choose among, on the emoji."""
    found = [line for line in lines(rows) if line.data == "emoji"]
    calls = sorted({line.calls for line in found}, reverse=True)
    body = []
    for method, name in README_METHODS.items():
        best = [
            max((line.psnr for line in found if (line.method, line.calls) == (method, count)), default=None)
            for count in calls
        ]
        body.append([name, *("" if psnr is None else f"{psnr:.1f}" for psnr in best)])
    return _grid(["method", *(f"{count} calls" for count in calls)], body)


def _best(of: dict[tuple[int, str], Line], calls: int) -> Line | None:
    """Return the better of a method's lines at a number of calls."""
    own = [line for (count, _), line in of.items() if count == calls]
    return max(own, key=lambda line: line.psnr) if own else None


def _cell(line: Line | None) -> str:
    """Return mean and range."""
    if line is None:
        return ""
    values = line.psnrs.values()
    return f"{line.psnr:.1f} ({min(values):.1f} to {max(values):.1f})"


def _fidelity(line: Line | None) -> str:
    """Return structural similarity, and the distance from a converged run."""
    return "" if line is None else f"{line.ssim:.4f}, {line.converged:.1f}"


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Lay out a table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body))


def draw(found: Sequence[Line], path: Path) -> None:
    """Draw PSNR against calls, a panel a data set: methods at their better schedule, with the spread over models."""
    from matplotlib.figure import Figure

    names = sorted({line.data for line in found})
    figure = Figure(figsize=(4.6 * len(names), 4.6), layout="constrained")
    panels = figure.subplots(1, max(len(names), 1), squeeze=False)[0]
    for panel, data in zip(panels, names, strict=False):
        counts = sorted({line.calls for line in found if line.data == data})
        for index, method in enumerate(DRAWN):
            own = {line.calls: line for line in reversed(found) if (line.data, line.method) == (data, method)}
            calls = [count for count in counts if count in own]
            middle = [own[count].psnr for count in calls]
            spread = [
                [own[count].psnr - min(own[count].psnrs.values()) for count in calls],
                [max(own[count].psnrs.values()) - own[count].psnr for count in calls],
            ]
            style = {"linewidth": 2.5, "zorder": 3} if method == SOLVER else {"linewidth": 1.2}
            panel.errorbar(calls, middle, spread, marker="o", capsize=3, color=f"C{index}", label=method, **style)
        panel.set(title=data, xlabel="calls of the blocks (of 50 steps)", ylabel="PSNR against all 50 calls, dB")
        panel.set_xticks(counts)
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("each method at its better schedule; bars: lowest and highest of the trained models", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)

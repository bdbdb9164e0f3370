"""`python -m benchmarks.report`: tables for README and docs/performance.md and the plots, of the committed results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import results
from benchmarks.cases import EAGER, EAGER_STEP, TAYLOR_LOOP
from benchmarks.harness import COPY
from benchmarks.pages import renewed
from benchmarks.results import RESULTS, Measurement

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/performance.md"
COMMAND = "python -m benchmarks.report"
Key = tuple[str, int, str, str]
SWEEPS = {"elements": "elements of a feature", "inputs": "K, features that are read", "rows": "M, forecasts"}
"""The cases of the plots of time, and what each varies."""
HEADLINES = (
    "FLUX 1024x1024, K=8",
    "FLUX 1024x1024, order 2",
    "Qwen-Image 1328x1328, K=8",
    "8 x 8",
    "51-256-256-1, 1 rows",
    "digits model",
    "57 blocks",
)
"""The sizes that the plot of bandwidth shows, by their beginnings."""
README_CASES = {
    ("predict", "FLUX 1024x1024, K=8, bfloat16"): "`predict`: one forecast from 8 features",
    ("forecast", "FLUX 1024x1024, K=8, M=6, bfloat16"): "`forecast_into`: six forecasts in one pass",
    ("predict_l1", "FLUX 1024x1024, K=8, bfloat16"): "`predict_l1`: loss and gradients of one forecast",
    ("TaylorSeer segment", "FLUX 1024x1024, order 2, M=6, bfloat16"): "a whole segment of TaylorSeer, order 2",
}
"""The cases that the README shows, and what it calls them."""


def newest(rows: Sequence[Measurement]) -> dict[Key, list[Measurement]]:
    """Return device, threads, op and size -> the rows of the case's last run, in the order of its variants."""
    cases: dict[Key, dict[str, Measurement]] = {}
    origins: dict[Key, tuple[str, str]] = {}
    for row in rows:
        key = (row.device, row.threads, row.op, row.size)
        if origins.setdefault(key, (row.commit, row.command)) != (row.commit, row.command):
            origins[key], cases[key] = (row.commit, row.command), {}
        cases.setdefault(key, {})[row.variant] = row
    return {key: list(found.values()) for key, found in cases.items()}


def is_headline(size: str) -> bool:
    """Whether the plot of bandwidth shows a size."""
    return size.startswith(HEADLINES)


def markdown(rows: Sequence[Measurement]) -> str:
    """Lay out the newest runs as tables, one for each machine; a case a line."""
    cases = {key: found for key, found in newest(rows).items() if key[2] not in SWEEPS}
    parts = []
    for device, threads in dict.fromkeys((device, threads) for device, threads, *_ in cases):
        own = [found for key, found in cases.items() if key[:2] == (device, threads)]
        origins = dict.fromkeys(f"`{found[0].command}`, {found[0].commit}, {found[0].date}" for found in own)
        versions = dict.fromkeys(found[0].torch for found in own)
        machine = f"{device}, {threads} thread{'s' * (threads != 1)}"
        parts.append(
            "\n".join(
                [
                    f"{machine}, torch {', '.join(versions)}; {'; '.join(origins)}:",
                    "",
                    "| case | ms | GB/s | of a copy | others take |",
                    "|---|---|---|---|---|",
                    *map(_line, own),
                ]
            )
        )
    return "\n\n".join(parts)


def readme_markdown(rows: Sequence[Measurement]) -> str:
    """Lay out the README's cases as last measured on the CPU: our time, and how much longer rivals take."""
    cases = {key: found for key, found in newest(rows).items() if key[2:] in README_CASES and "NVIDIA" not in key[0]}
    first = next(iter(cases.values()))[0]
    lines = [
        f"FLUX at 1024x1024, bfloat16; {first.device}, {first.threads} threads, torch {first.torch}:",
        "",
        "| op | ms | `torch.compile` takes | eager, as published, takes |",
        "|---|---|---|---|",
    ]
    for key, (ours, *others) in cases.items():
        compiled = min((row.median_s for row in others if row.variant.startswith("torch.compile")), default=None)
        eager = next((row.median_s for row in others if _is_eager(row.variant)), None)
        ratios = ["" if time is None else f"{_times(time / ours.median_s)}x" for time in (compiled, eager)]
        lines.append(f"| {README_CASES[key[2:]]} | {1e3 * ours.median_s:.3g} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def _is_eager(variant: str) -> bool:
    return variant.endswith((EAGER, EAGER_STEP, TAYLOR_LOOP))


def _line(found: Sequence[Measurement]) -> str:
    ours, *others = found
    times = [f"{row.variant} {_times(row.median_s / ours.median_s)}x" for row in others if row.variant != COPY]
    cells = [
        f"`{ours.op}`, {ours.size}",
        f"{1e3 * ours.median_s:.3g}",
        "" if ours.gb_per_s is None else f"{ours.gb_per_s:.3g}",
        "" if ours.share_of_copy is None else f"{100 * ours.share_of_copy:.0f} %",
        "; ".join(times),
    ]
    return f"| {' | '.join(cells)} |"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def draw(rows: Sequence[Measurement], path: Path) -> None:
    """Draw for each case of the newest runs which share of a copy's bandwidth the variants reach."""
    from matplotlib.figure import Figure

    cases = {
        key: found for key, found in newest(rows).items() if key[2] not in SWEEPS and found[0].share_of_copy is not None
    }
    bars = sum(len(found) for found in cases.values())
    figure = Figure(figsize=(9.0, 1.5 + 0.22 * bars + 0.3 * len(cases)), layout="constrained")
    axes = figure.subplots()
    position, places, names = 0.0, [], []
    for (device, threads, op, size), found in cases.items():
        axes.text(0.01, position, f"{op}, {size}; {device}, {threads} threads", fontsize=8, weight="bold", va="center")
        for index, row in enumerate(found):
            position += 1.0
            color = "black" if row.variant == COPY else "C0" if index == 0 else "0.7"
            axes.barh(position, 100 * (row.share_of_copy or 0.0), color=color)
            places.append(position)
            names.append(f"{row.variant}, {1e3 * row.median_s:.3g} ms")
        position += 1.6
    axes.set_yticks(places, names, fontsize=7)
    axes.set(xlabel="bandwidth, % of a copy of as many bytes in the same run (higher is better)", ylim=(position, -1.0))
    axes.axvline(100.0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_sweeps(rows: Sequence[Measurement], path: Path) -> None:
    """Draw the time of the newest sweeps against what each varies, one panel each, for the machine measured last."""
    from matplotlib.figure import Figure

    cases = {key: found for key, found in newest(rows).items() if key[2] in SWEEPS}
    machine = list(cases)[-1][:2]
    figure = Figure(figsize=(13.0, 4.2), layout="constrained")
    for axes, (op, label) in zip(figure.subplots(1, len(SWEEPS)), SWEEPS.items(), strict=True):
        lines: dict[str, list[tuple[int, Measurement]]] = {}
        for key, found in cases.items():
            if key[:2] == machine and key[2] == op:
                for row in found:
                    lines.setdefault(row.variant, []).append((_varied(op, row.size), row))
        for name, points in lines.items():
            points.sort(key=lambda point: point[0])
            places = [place for place, _ in points]
            style = {"color": "black", "linestyle": "--"} if name == COPY else {}
            axes.plot(places, [1e3 * row.median_s for _, row in points], marker=".", label=name, **style)
            axes.fill_between(
                places, [1e3 * row.p20_s for _, row in points], [1e3 * row.p80_s for _, row in points], alpha=0.15
            )
        if op == "elements":
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_ylim(bottom=0)
        fixed = next(iter(lines.values()))[-1][1].size.split(", ") if lines else []
        same = [part for part in fixed if not part.startswith(_LETTERS[op])]
        axes.set(xlabel=label, ylabel="ms", title=", ".join(same[1:] if op == "elements" else same))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(f"{machine[0]}, {machine[1]} threads; medians, 20 % to 80 % of the samples shaded")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


_LETTERS = {"elements": "N", "inputs": "K=", "rows": "M="}


def _varied(op: str, size: str) -> int:
    """Read what a sweep varies from the name of a size."""
    if op == "elements":
        return int(size.split(" ")[0])
    return next(int(part.split("=")[1]) for part in size.split(", ") if part.startswith(_LETTERS[op]))


def main(
    source: Annotated[Path, typer.Option(help="The file of the results.")] = RESULTS,
    readme: Annotated[Path, typer.Option(help="The text that holds the table.")] = ROOT / "README.md",
    page: Annotated[Path, typer.Option(help="The text that holds the table of all cases.")] = PAGE,
    pictures: Annotated[Path, typer.Option(help="The folder of the plots.")] = ROOT / "docs/performance",
) -> None:
    """Write the tables and the plots."""
    rows = results.load(source)
    for text, made in ((readme, readme_markdown(rows)), (page, markdown(rows))):
        text.write_text(renewed(text.read_text(encoding="utf-8"), COMMAND, made), encoding="utf-8")
    draw([row for row in rows if is_headline(row.size)], pictures / "bandwidth.png")
    draw_sweeps(rows, pictures / "time.png")
    typer.echo(f"tables: {readme}, {page}; plots: {pictures}")


if __name__ == "__main__":
    typer.run(main)

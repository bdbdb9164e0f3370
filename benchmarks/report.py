"""`python -m benchmarks.report`: the README's table and a picture, made of the committed results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import results
from benchmarks.harness import COPY
from benchmarks.pages import renewed
from benchmarks.results import RESULTS, Measurement

ROOT = Path(__file__).parents[1]
COMMAND = "python -m benchmarks.report"
Key = tuple[str, int, str, str]


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


def markdown(rows: Sequence[Measurement]) -> str:
    """Lay out the newest runs as tables, one for each machine; a case a line."""
    cases = newest(rows)
    parts = []
    for device, threads in dict.fromkeys((device, threads) for device, threads, *_ in cases):
        own = [found for key, found in cases.items() if key[:2] == (device, threads)]
        origins = dict.fromkeys(f"`{found[0].command}`, {found[0].commit}, {found[0].date}" for found in own)
        versions = dict.fromkeys(found[0].torch for found in own)
        parts.append(
            "\n".join(
                [
                    f"{device}, {threads} threads, torch {', '.join(versions)}; {'; '.join(origins)}:",
                    "",
                    "| case | ms | GB/s | of a copy | others take |",
                    "|---|---|---|---|---|",
                    *map(_line, own),
                ]
            )
        )
    return "\n\n".join(parts)


def _line(found: Sequence[Measurement]) -> str:
    ours, *others = found
    times = [f"{row.variant} {_times(row.median_s / ours.median_s)}x" for row in others if row.variant != COPY]
    cells = [
        f"`{ours.op}`, {ours.size}",
        f"{1e3 * ours.median_s:.3g}",
        f"{ours.gb_per_s:.3g}",
        f"{100 * ours.share_of_copy:.0f} %",
        "; ".join(times),
    ]
    return f"| {' | '.join(cells)} |"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def draw(rows: Sequence[Measurement], path: Path) -> None:
    """Draw for each case of the newest runs which share of a copy's bandwidth the variants reach."""
    from matplotlib.figure import Figure

    cases = newest(rows)
    bars = sum(len(found) for found in cases.values())
    figure = Figure(figsize=(9.0, 1.5 + 0.22 * bars + 0.3 * len(cases)), layout="constrained")
    axes = figure.subplots()
    position, places, names = 0.0, [], []
    for (device, threads, op, size), found in cases.items():
        axes.text(0.01, position, f"{op}, {size}; {device}, {threads} threads", fontsize=8, weight="bold", va="center")
        for index, row in enumerate(found):
            position += 1.0
            color = "black" if row.variant == COPY else "C0" if index == 0 else "0.7"
            axes.barh(position, max(100 * row.share_of_copy, 0.01), color=color)
            places.append(position)
            names.append(f"{row.variant}, {1e3 * row.median_s:.3g} ms")
        position += 1.6
    axes.set_yticks(places, names, fontsize=7)
    axes.set(xlabel="bandwidth, % of a copy of as many bytes in the same run (higher is better)", ylim=(position, -1.0))
    axes.axvline(100.0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(
    source: Annotated[Path, typer.Option(help="The file of the results.")] = RESULTS,
    readme: Annotated[Path, typer.Option(help="The text that holds the table.")] = ROOT / "README.md",
    picture: Annotated[Path, typer.Option(help="The picture.")] = ROOT / "docs/performance/bandwidth.png",
) -> None:
    """Write the README's table and the picture."""
    rows = results.load(source)
    readme.write_text(renewed(readme.read_text(encoding="utf-8"), COMMAND, markdown(rows)), encoding="utf-8")
    draw(rows, picture)
    typer.echo(f"table: {readme}, picture: {picture}")


if __name__ == "__main__":
    typer.run(main)

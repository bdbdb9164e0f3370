"""`python -m benchmarks.quality`: compare all methods on trained models; trains what is missing, resumes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.pages import renewed
from benchmarks.quality import tables
from benchmarks.quality.methods import INTERVALS, Effort, sampled
from benchmarks.quality.setting import DATA, Data, Setting
from benchmarks.results import origin
from examples.digits import train_model
from examples.digits.comparison import psnr
from lesa_kernels.machine import one_thread

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMMAND = "python -m benchmarks.quality --report --page docs/quality.md --readme README.md"
LOG_WIDTH = 120


def compare(
    data: Data,
    seed: int,
    setting: Setting,
    calls: int,
    interval: int,
    effort: Effort = Effort(),  # noqa: B008
) -> list[tables.Row]:
    """Run all methods on one model at one number of calls."""
    here = origin(torch.device("cpu"))
    rows = []
    for each in sampled(setting, calls, interval, effort):
        mean, error = psnr(each.images, setting.reference)
        rows.append(
            tables.Row(
                data=data.name,
                seed=seed,
                calls=calls,
                method=each.method,
                schedule=each.schedule,
                full_steps=" ".join(map(str, each.full_steps)),
                psnr=round(mean, 3),
                psnr_error=round(error, 3),
                psnr_converged=round(psnr(each.images, setting.converged)[0], 3),
                samples=len(setting.noise),
                device=here.device,
                torch=here.torch,
                commit=here.commit,
                date=here.date,
                command=f"python -m benchmarks.quality --data {data.name} --seed {seed} --calls {calls}",
            )
        )
    return rows


@one_thread()
def main(
    data: Annotated[list[str] | None, typer.Option(help="Only this data set: digits or mnist.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only the model of this seed; else 0, 1, 2.")] = None,
    calls: Annotated[list[int] | None, typer.Option(help="Only at so many calls; else 10, 8, 6.")] = None,
    models: Annotated[Path, typer.Option(help="Folder of the trained models.")] = Path("build/models"),
    out: Annotated[Path, typer.Option(help="The file of the results.")] = HERE / "results.csv",
    plot: Annotated[Path, typer.Option(help="The picture.")] = ROOT / "docs/quality/quality.png",
    report: Annotated[bool, typer.Option("--report", help="Measure nothing, report what is there.")] = False,
    page: Annotated[Path | None, typer.Option(help="The page whose tables are made anew.")] = None,
    readme: Annotated[Path | None, typer.Option(help="The page whose short table is made anew.")] = None,
) -> None:
    """Compare all methods; rows that are there already are kept."""
    console = Console(width=None if sys.stdout.isatty() else LOG_WIDTH)
    begin = time.monotonic()
    for name in data or DATA:
        if name not in DATA:
            raise typer.BadParameter(f"--data must be one of {', '.join(DATA)}, got {name}")
    if unknown := [count for count in calls or () if count not in INTERVALS]:
        raise typer.BadParameter(f"--calls must be among {', '.join(map(str, INTERVALS))}, got {unknown[0]}")
    rows = tables.load(out)
    for name in data or DATA:
        chosen = DATA[name]
        for number in seed or (0, 1, 2):
            there = {row.calls for row in rows if (row.data, row.seed) == (name, number)}
            missing = [count for count in calls or INTERVALS if count not in there]
            if report or not missing:
                continue
            setting = Setting.load(chosen, _model(chosen, number, models, console))
            for count in missing:
                with console.status(f"{name}, model {number}, {count} calls"):
                    rows += compare(chosen, number, setting, count, INTERVALS[count])
                tables.save(rows, out)
                console.print(f"{name}, model {number}, {count} calls: {time.monotonic() - begin:.0f} s")
    found = tables.lines(rows)
    for name, count in sorted({(line.data, line.calls) for line in found}, key=lambda key: (key[0], -key[1])):
        console.print(tables.table(found, name, count))
    console.print(tables.verdict_table(tables.verdicts(rows)))
    tables.draw(found, plot)
    for text, made in ((page, tables.markdown(rows)), (readme, tables.readme_markdown(rows))):
        if text is not None:
            text.write_text(renewed(text.read_text(encoding="utf-8"), COMMAND, made), encoding="utf-8")
    console.print(f"{time.monotonic() - begin:.0f} s; rows: {out}, picture: {plot}")


def _model(data: Data, seed: int, models: Path, console: Console) -> Path:
    """Return the folder of a trained model; train it where it is missing."""
    folder = data.folder(models, seed)
    if not (folder / "config.json").is_file():
        console.print(f"training the model of {data.name}, seed {seed}: {data.iterations} iterations")
        train_model.main(
            out=folder,
            data=train_model.Data(data.name),
            iterations=data.iterations,
            batch=data.batch,
            seed=seed,
            device="cpu",
        )
    return folder


if __name__ == "__main__":
    typer.run(main)

"""`python -m benchmarks.quality`: compare all methods on trained models; trains what is missing, resumes."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.pages import renewed
from benchmarks.quality import tables
from benchmarks.quality.measures import psnr, ssim
from benchmarks.quality.methods import INTERVALS, METHODS, RUNS, Effort, find_schedule
from benchmarks.quality.setting import DATA, Data, Setting
from benchmarks.results import origin
from lesa_kernels.machine import one_thread
from lesa_kernels.schedule import Schedule

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMMAND = "python -m benchmarks.quality --report --page docs/quality.md --readme README.md"
LOG_WIDTH = 120


def compare(
    data: Data, seed: int, setting: Setting, calls: int, rows: list[tables.Row], effort: Effort, chosen: list[str]
) -> Iterator[tables.Row]:
    """Yield the rows of a model at one number of calls that are not there yet.

    Args:
        data: of the model.
        seed: of the model.
        setting: the model.
        calls: of the blocks.
        rows: that are there; new ones are added by the caller before the next is made.
        effort: of the searches, which the first model has.
        chosen: names of the methods.
    """
    here = origin(torch.device("cpu"))
    for name in chosen:
        method = METHODS[name]
        for kind in (tables.DEFAULT, tables.BEST):
            found = {
                (row.seed, row.method, row.schedule): row for row in rows if (row.data, row.calls) == (data.name, calls)
            }
            if (seed, name, kind) in found or (kind == tables.BEST and method.searched is None):
                continue
            schedule = method.default(setting, calls)
            if kind == tables.BEST:
                searched = found.get((tables.SEARCHED_SEED, str(method.searched), kind))
                if searched is not None:
                    schedule = Schedule.explicit(setting.known.steps, map(int, searched.full_steps.split()))
                elif seed == tables.SEARCHED_SEED:
                    schedule = find_schedule(setting, str(method.searched), calls, effort)
                else:
                    continue
            images, full_steps = method.sample(setting.unseen, setting, schedule)
            mean, error = psnr(images, setting.unseen.plain)
            yield tables.Row(
                data=data.name,
                seed=seed,
                calls=calls,
                method=name,
                schedule=kind,
                full_steps=" ".join(map(str, full_steps)),
                psnr=round(mean, 3),
                psnr_error=round(error, 3),
                ssim=round(ssim(images, setting.unseen.plain), 5),
                psnr_converged=round(psnr(images, setting.unseen.converged)[0], 3),
                samples=len(setting.unseen),
                device=here.device,
                torch=here.torch,
                commit=here.commit,
                date=here.date,
                command=f"python -m benchmarks.quality --data {data.name} --seed {seed} --calls {calls}",
            )


@one_thread()
def main(
    data: Annotated[list[str] | None, typer.Option(help=f"Only this data set: {', '.join(DATA)}.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only the model of this seed; else 0, 1, 2.")] = None,
    calls: Annotated[list[int] | None, typer.Option(help="Only at so many calls; else 10, 8, 6.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; else all.")] = None,
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
    _check("--data", data, DATA)
    _check("--calls", calls, INTERVALS)
    _check("--method", method, METHODS)
    rows = tables.load(out)
    # A searched schedule comes from the first model.
    for number in () if report else sorted(seed or (0, 1, 2)):
        for name in data or DATA:
            setting = Setting.load(DATA[name], _model(DATA[name], number, models, console), max(RUNS.values()))
            for count in calls or INTERVALS:
                measured = compare(DATA[name], number, setting, count, rows, Effort(), method or list(METHODS))
                for row in measured:
                    rows.append(row)
                    tables.save(rows, out)
                    what = f"{name}, model {number}, {count} calls, {row.method}, {row.schedule}"
                    console.print(f"{what}: {row.psnr:.2f} dB; {time.monotonic() - begin:.0f} s", highlight=False)
    found = tables.lines(rows)
    for name, count in sorted({(line.data, line.calls) for line in found}, key=lambda key: (key[0], -key[1])):
        console.print(tables.table(found, name, count))
    console.print(tables.verdict_table(tables.verdicts(rows)))
    tables.draw(found, plot)
    for text, made in ((page, tables.markdown(rows)), (readme, tables.readme_markdown(rows))):
        if text is not None:
            text.write_text(renewed(text.read_text(encoding="utf-8"), COMMAND, made), encoding="utf-8")
    console.print(f"{time.monotonic() - begin:.0f} s; rows: {out}, picture: {plot}")


def _check(option: str, values: Sequence[str | int] | None, known: Iterable[str | int]) -> None:
    """Check an option that takes some values alone."""
    for value in values or ():
        if value not in known:
            raise typer.BadParameter(f"{option} must be among {', '.join(map(str, known))}, got {value}")


def _model(data: Data, seed: int, models: Path, console: Console) -> Path:
    """Return the folder of a trained model; train it where it is missing."""
    folder = data.folder(models, seed)
    if not (folder / "config.json").is_file():
        console.print(f"training the model of {data.name}, seed {seed}")
        data.train(folder, seed)
    return folder


if __name__ == "__main__":
    typer.run(main)

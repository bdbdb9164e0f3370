"""`python -m benchmarks.history`: what the dtype of the history does to images, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.pages import renewed
from benchmarks.quality.measures import psnr
from benchmarks.quality.setting import DATA, Samples, Setting
from benchmarks.results import origin
from lesa_kernels.integrations import enabled, summary
from lesa_kernels.predictors import LesaPredictor, LinearPredictor, Predictor, TaylorSeer
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import TrainingConfig, fit, train

COMMAND = "python -m benchmarks.history"
UNIFORM, WARM_UNIFORM, WARMUP = "uniform in sigma", "0-3, then uniform", 4
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CALLS = 10
LEARN = 16


@dataclass(frozen=True)
class Case:
    """What is sampled with every history.

    Args:
        method: name of the predictor.
        full_steps: the name of its schedule.
        predictor: makes the others.
        schedule: the full steps.
        chunk: forecasts that are made at once, None for those of a segment.
    """

    method: str
    full_steps: str
    predictor: Predictor
    schedule: Schedule
    chunk: int | None


@dataclass(frozen=True)
class Line:
    """A case with each history.

    Args:
        case: what was sampled.
        found: (PSNR in dB against all steps in full, bytes of the history) for each of the dtypes.
    """

    case: Case
    found: tuple[tuple[float, int], ...]


def cases(setting: Setting, calls: int = CALLS, config: TrainingConfig | None = None) -> Iterator[Case]:
    """Yield the cases; trains and fits on the setting's own runs.

    Args:
        setting: the model and its noise.
        calls: of the blocks.
        config: of LESA's training, None for the tuned one.
    """
    known = setting.known
    uniform = Schedule.uniform_in_sigma(known.sigmas, calls)
    warm = Schedule.uniform_in_sigma(known.sigmas, calls, WARMUP)
    trained = LesaPredictor(known.steps)
    train(trained, known.recorded, warm, config or TrainingConfig.tuned(), progress=False)
    fitted = fit(known.source(), uniform, batch=len(known), progress=False)
    if not isinstance(fitted, LinearPredictor):
        raise RuntimeError("the model of this comparison must be without guidance")
    named: list[tuple[str, str, Predictor, Schedule]] = [
        ("TaylorSeer 2, sigma", UNIFORM, TaylorSeer(2, "sigma"), uniform),
        ("coefficients through the tail", UNIFORM, fitted, uniform),
        ("LESA, tuned", WARM_UNIFORM, trained, warm),
    ]
    for chunk in (None, 1):
        for each in named:
            yield Case(*each, chunk)


def measure(samples: Samples, case: Case) -> Line:
    """Sample the unseen noise with each history.

    Raises:
        RuntimeError: when a run went on without forecasts.
    """
    found = []
    for dtype in DTYPES:
        with enabled(samples.pipe, case.predictor, case.schedule, history_dtype=dtype, chunk=case.chunk):
            images = samples.sampled()
            run = summary(samples.pipe)
        if run.refused is not None:
            raise RuntimeError(f"{case.method} with a history of {dtype}: {run.refused}")
        found.append((psnr(images, samples.plain)[0], run.history_bytes))
    return Line(case, tuple(found))


def markdown(lines: Sequence[Line], samples: int) -> str:
    """Lay out the lines as a table."""
    here = origin(torch.device("cpu"))
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES]
    head = ["predictor", "full steps", "at once", *names]
    rows = [
        [line.case.method, line.case.full_steps, "a segment" if line.case.chunk is None else str(line.case.chunk)]
        + [f"{quality:.2f} dB, {size / 2**20:.1f} MiB" for quality, size in line.found]
        for line in lines
    ]
    full = len(lines[0].case.schedule.full_steps)
    return "\n".join(
        [
            f"PSNR of {samples} unseen samples against those with all steps in full, and memory of the history; {full} "
            f"full steps of {lines[0].case.schedule.num_steps}, features in float32; "
            f"{here.device}, torch {here.torch}, {here.commit}, {here.date}:",
            "",
            *(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)),
        ]
    )


def main(
    samples: Annotated[int, typer.Option(help="Unseen samples to judge on.", min=1)] = 64,
    page: Annotated[Path | None, typer.Option(help="The page whose table is made anew.")] = None,
) -> None:
    """Compare the histories on the committed digits model, at ten full steps."""
    torch.manual_seed(0)
    data = replace(DATA["mnist"], samples=samples)
    setting = Setting.load(data, data.folder(Path(), 0), LEARN)
    made = markdown([measure(setting.unseen, case) for case in cases(setting)], samples)
    typer.echo(made)
    if page is not None:
        page.write_text(renewed(page.read_text(encoding="utf-8"), COMMAND, made), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

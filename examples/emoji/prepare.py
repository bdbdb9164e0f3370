"""Makes what the demo finds ready: placements of the learned solver's calls, and LESA as published.

`python -m examples.emoji.prepare placements` prints the first, which stand in `demo.py`; `python -m
examples.emoji.prepare lesa` trains the second and writes it to the folder `lesa`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer

from examples.emoji import prompts
from examples.emoji.emoji_pipeline import EmojiPipeline
from lesa_kernels.integrations import PipelineSource
from lesa_kernels.machine import one_thread
from lesa_kernels.predictors import LesaPredictor, LinearPredictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import SolverFits, TrainingConfig, even_schedules, search_schedule, train

STEPS = 50
INTERVALS = {10: 7, 8: 10, 6: 22}
"""Calls of the blocks at 50 steps -> interval N of LESA's published rule."""
LESA = Path(__file__).parent / "lesa"
"""The folder of LESA as published, a folder for each number of calls."""

app = typer.Typer(add_completion=False)


def known_runs(count: int, device: str = "cpu", steps: int = STEPS) -> PipelineSource:
    """Return runs of the model to learn from.

    Args:
        count: how many.
        device: where the model runs.
        steps: S.
    """
    pipe = EmojiPipeline.load(device)
    pipe.set_progress_bar_config(disable=True)
    return PipelineSource(pipe, prompts.known_prompts(count), steps=steps, seed=prompts.KNOWN_SEED)


def folded(predictor: LesaPredictor, sigmas: Sequence[float], schedule: Schedule) -> LinearPredictor:
    """Return the coefficients that a LESA predictor has for one schedule: the same forecasts in 3 KB instead of 9 MB.

    Args:
        predictor: LESA.
        sigmas: S+1 falling noise levels.
        schedule: its full steps.

    Returns:
        The coefficients, of as many last steps as the longest of the predictor's stages reads.
    """
    rule = predictor.rows(sigmas)
    rows = {}
    for step in sorted(set(range(schedule.num_steps)) - set(schedule.full_steps)):
        row = rule(step, [full for full in schedule.full_steps if full < step])
        if row is not None:
            rows[step] = row
    window = max(window for _, window in predictor.stages)
    return LinearPredictor.from_rows(sigmas, schedule, rows, window, over_all=True)


@app.command()
def placements(
    calls: Annotated[list[int] | None, typer.Option(help="Full steps; repeatable. Default: 10, 8 and 6.")] = None,
    search: Annotated[int, typer.Option(min=3, help="Placements to try for each.")] = 60,
    runs: Annotated[int, typer.Option(min=2, help="Runs; fitted to one half, judged on the other.")] = 48,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps.")] = STEPS,
) -> None:
    """Search for the full steps that serve the learned solver best, and print them."""
    with one_thread():
        source = known_runs(runs, steps=steps)
        fits = SolverFits(source, held_out=runs // 2, batch=16)
        for count in calls or INTERVALS:
            found = search_schedule(fits.psnr_db, even_schedules(source.sigmas, count), placements=search)
            typer.echo(
                f"{count}: {found.schedule.full_steps},  # {found.psnr_db:.2f} dB, {found.placements} placements"
            )


@app.command()
def lesa(
    out: Annotated[Path, typer.Option(help="Folder for the predictors.", file_okay=False)] = LESA,
    runs: Annotated[int, typer.Option(min=1, help="Runs to train on.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of the first weights.")] = 0,
) -> None:
    """Train LESA with its published settings and schedule for 10, 8 and 6 calls, and write its coefficients."""
    with one_thread():
        source = known_runs(runs)
        for count, interval in INTERVALS.items():
            schedule = Schedule.interval(STEPS, interval)
            torch.manual_seed(seed)
            predictor = LesaPredictor(STEPS)
            train(predictor, source, schedule, TrainingConfig.published(), description=f"LESA, {count} calls")
            folded(predictor, source.sigmas, schedule).save_pretrained(out / f"{count}-calls")


if __name__ == "__main__":
    app(prog_name="python -m examples.emoji.prepare")

"""Runs `lesa calibrate`: searches the full steps for a budget, fits a predictor to them, and saves it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import partial
from typing import Annotated

import torch
import typer
from rich.console import Console

from lesa_kernels.cli import common
from lesa_kernels.integrations import default_schedule
from lesa_kernels.predictors import LesaPredictor, LinearPredictor, TaylorSeer
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import Evaluator, fit, fit_lesa, schedule_for_budget, search_schedule
from lesa_kernels.training.checkpoint import FILE
from lesa_kernels.training.ranks import lock_folder
from lesa_kernels.training.reports import save_predictors
from lesa_kernels.trajectories import ONLY_BRANCH, TrajectorySource

# Of a fit that only shows how good a schedule is.
_ROUNDS_TO_TRY = 2
_BUDGET, _SEARCH = "Budget: one of these, else a fifth of the steps", "Search and fit"


class Form(str, Enum):
    """What a fit yields."""

    coefficients = "coefficients"
    lesa = "lesa"


def calibrate(
    model: common.Model,
    prompts: common.Prompts,
    out: common.Out,
    calls: Annotated[
        int | None, typer.Option(help="Steps on which the blocks run.", min=1, rich_help_panel=_BUDGET)
    ] = None,
    psnr_db: Annotated[
        float | None,
        typer.Option(
            help="As few calls as keep the final latents this near, in dB: -20 log10(relative error).",
            rich_help_panel=_BUDGET,
        ),
    ] = None,
    search: Annotated[
        int,
        typer.Option(
            help="Schedules to try with TaylorSeer; each samples all prompts once. 0: evenly spaced steps.",
            min=0,
            rich_help_panel=_SEARCH,
        ),
    ] = 40,
    refine: Annotated[
        int,
        typer.Option(
            help="Schedules to try from there on with a fit for each: slow, up to 1 dB better.",
            min=0,
            rich_help_panel=_SEARCH,
        ),
    ] = 0,
    form: Annotated[
        Form,
        typer.Option(
            help="coefficients: three for each step. lesa: a LESA predictor, slower to fit, up to 2 dB better.",
            rich_help_panel=_SEARCH,
        ),
    ] = Form.coefficients,
    steps: common.Steps = 50,
    settings: common.Settings = None,
    batch: common.Batch = 1,
    seed: common.Seed = 0,
    capture: common.Capture = None,
    device: common.Device = None,
    dtype: common.Dtype = None,
    offload: common.Offload = False,
) -> None:
    """Find the best steps to run in full, fit a predictor for the others through the model's tail, and save it.

    With classifier-free guidance each branch gets a predictor of its own. Runs in one process.
    """
    common.check_modules("lesa calibrate", "diffusers")
    console = common.make_console()
    if calls is not None and psnr_db is not None:
        raise typer.BadParameter("give one budget: --calls or --psnr-db")
    if calls is not None and calls >= steps:
        raise typer.BadParameter(
            f"--calls must be below --steps {steps}, so that a step is left to forecast, got {calls}"
        )
    if not search and psnr_db is not None:
        raise typer.BadParameter("--psnr-db needs a --search of at least 1")
    with common.command("Interrupted, nothing is saved."):
        pipeline = common.Pipeline(model, prompts, steps, settings, seed, capture, common.place(device), dtype, offload)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(f"lesa calibrate runs in one process, got {torch.distributed.get_world_size()}")
        if (out / FILE).is_file():
            raise ValueError(f"--out {out} holds a training; take another folder")
        # Locked before the work, so that a folder that cannot be written to is refused at once.
        with lock_folder(out):
            source = pipeline.source(console)
            schedule = _search(source, calls, psnr_db, search, refine, batch, console)
            console.print(common.full_steps(schedule), soft_wrap=True)
            torch.manual_seed(seed)
            predictors = _fitted(form, source, schedule, batch)
            save_predictors(predictors, out)
    common.show_files(out, console)
    lines = pipeline.next_lines(common.loading(predictors, out))
    console.print("\n" + lines, markup=False, highlight=False, soft_wrap=True)


def _search(
    source: TrajectorySource,
    calls: int | None,
    psnr_db: float | None,
    search: int,
    refine: int,
    batch: int,
    console: Console,
) -> Schedule:
    """Return the full steps: evenly spaced in sigma, or found with TaylorSeer and then with fits."""
    if calls is None and psnr_db is None:
        calls = len(default_schedule(source.sigmas).full_steps)
    schedule = None if calls is None else Schedule.uniform_in_sigma(source.sigmas, calls)
    if not search and not refine and schedule is not None:
        return schedule
    evaluator = Evaluator(source, batch=batch)
    if search or schedule is None:
        taylor = TaylorSeer(2, "sigma")
        found = schedule_for_budget(evaluator, lambda _: taylor, calls=calls, psnr_db=psnr_db, evaluations=search)
        console.print(f"TaylorSeer's best of {found.evaluations} schedules: {found.score.psnr_db:.2f} dB")
        schedule = found.schedule
    if refine:
        make = partial(fit, source, rounds=_ROUNDS_TO_TRY, batch=batch, progress=False)
        uniform = Schedule.uniform_in_sigma(source.sigmas, len(schedule.full_steps))
        starts = list(dict.fromkeys([schedule, uniform]))[:refine]
        found = search_schedule(evaluator, starts, make, evaluations=refine)
        console.print(f"a fit's best of {found.evaluations} schedules: {found.score.psnr_db:.2f} dB on its own runs")
        schedule = found.schedule
    return schedule


def _fitted(
    form: Form, source: TrajectorySource, schedule: Schedule, batch: int
) -> Mapping[str, LinearPredictor | LesaPredictor]:
    """Fit the predictor of each branch of guidance, or of the only one."""
    fitted = fit(source, schedule, batch=batch)
    if not isinstance(fitted, LinearPredictor):
        if form is Form.lesa:
            raise ValueError("--form lesa fits a model without guidance; --form coefficients fits each of its branches")
        return fitted
    return {ONLY_BRANCH: fitted if form is Form.coefficients else fit_lesa(source, fitted, batch=batch)}

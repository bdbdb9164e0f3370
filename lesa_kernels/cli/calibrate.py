"""Runs `lesa calibrate`: searches the full steps for a budget, fits a predictor to them, and saves it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from lesa_kernels.cli import common
from lesa_kernels.predictors import LinearPredictor, SolverPredictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import (
    Evaluator,
    SelectedRuns,
    SolverFits,
    even_schedules,
    fewest_calls,
    fit,
    plot_curve,
    quality_curve,
    search_schedule,
)
from lesa_kernels.training.checkpoint import FILE
from lesa_kernels.training.ranks import lock_folder
from lesa_kernels.training.reports import save_predictors
from lesa_kernels.training.schedule_search import Judge
from lesa_kernels.trajectories import ONLY_BRANCH, TrajectorySource

# Of a fit that only shows how good a schedule is.
_ROUNDS_TO_TRY = 2
# Budgets of the curve, relative to a fifth of the steps.
_CURVE = (0.5, 0.6, 0.8, 1.0, 1.2, 1.4)
_CURVE_FILE = "curve.png"
# Found with 8 prompts, placements were 0.3 to 1.3 dB worse than even ones on other noise (MNIST model, 8 calls).
_FEW_RUNS = 16
# Of a step, for a finer target.
_PARTS = 4
_BUDGET, _SEARCH = "Budget: one of these, else a fifth of the steps and a curve of others", "Search and fit"


class Form(str, Enum):
    """What a fit yields."""

    solver = "solver"
    coefficients = "coefficients"


class Target(str, Enum):
    """What a learned solver is to reach."""

    plain = "plain"
    finer = "finer"


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
            help="Placements of the full steps to try; each is fitted to half of the prompts and judged on the others. "
            "For 16 prompts, 10 calls, 50 steps the unaccelerated runs take 800 calls of the model, 24 placements at "
            "most 3840 more. Small models: 60. 0, and for 8 prompts: evenly spaced steps.",
            min=0,
            rich_help_panel=_SEARCH,
        ),
    ] = 24,
    form: Annotated[
        Form,
        typer.Option(
            help="solver: a learned solver. coefficients: of features, through the model's tail, slower to fit.",
            rich_help_panel=_SEARCH,
        ),
    ] = Form.solver,
    target: Annotated[
        Target,
        typer.Option(
            help="What a solver is to reach. plain: the run with all steps. finer: one with four times as many, nearer "
            "to the equation's solution; takes as many calls more.",
            rich_help_panel=_SEARCH,
        ),
    ] = Target.plain,
    steps: common.Steps = 50,
    settings: common.Settings = None,
    batch: common.Batch = 1,
    seed: common.Seed = 0,
    capture: common.Capture = None,
    device: common.Device = None,
    dtype: common.Dtype = None,
    offload: common.Offload = False,
) -> None:
    """Find the best steps to run in full, fit a predictor for the others, and save it. Runs in one process."""
    if calls is not None and psnr_db is not None:
        raise typer.BadParameter("give one budget: --calls or --psnr-db")
    if calls is not None and calls >= steps:
        raise typer.BadParameter(
            f"--calls must be below --steps {steps}, so that a step is left to forecast, got {calls}"
        )
    if not search and psnr_db is not None:
        raise typer.BadParameter("--psnr-db needs a --search of at least 1")
    if target is Target.finer and form is not Form.solver:
        raise typer.BadParameter(f"--target finer needs --form solver, got {form.value}")
    with common.command("Interrupted: files that were written are whole, the same command begins anew."):
        common.check_modules("lesa calibrate", "diffusers", "matplotlib")
        console = common.make_console()
        pipeline = common.Pipeline(model, prompts, steps, settings, seed, capture, common.place(device), dtype, offload)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ValueError(f"lesa calibrate runs in one process, got {torch.distributed.get_world_size()}")
        if (out / FILE).is_file():
            raise ValueError(f"--out {out} holds a training; take another folder")
        # Locked before the work, so that a folder that cannot be written to is refused at once.
        with lock_folder(out):
            source = pipeline.source(console)
            torch.manual_seed(seed)
            budget = calls or min(max(3, -(-steps // 5)), steps - 1)
            has_curve = bool(search) and calls is None and psnr_db is None
            numbers = sorted({min(max(2, round(budget * part)), steps - 1) for part in _CURVE}) if has_curve else []
            finer = source.refined(_PARTS) if target is Target.finer else None
            if search and len(source) < _FEW_RUNS:
                search = min(search, len(even_schedules(source.sigmas, budget)))
            if form is Form.solver:
                make = partial(_solver, source, finer, batch, search)
            else:
                make = partial(_through_tail, source, batch, search)
            planned = budget if psnr_db is None else None
            fits = _fits(make, _Cost(form, target, len(source), steps), planned, search, numbers, console)
            schedule = _placement(fits, source.sigmas, budget, psnr_db, search, console)
            if has_curve:
                _draw_curve(fits, source.sigmas, numbers, schedule, out / _CURVE_FILE, console)
            predictors = fits.predictors(schedule)
            save_predictors(predictors, out)
        common.show_files(out, console)
        lines = pipeline.next_lines(common.loading(predictors, out))
        console.print("\n" + lines, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Fits:
    """Fits to all runs; without a search nothing else, else how good placements are by fits to half, and by Euler."""

    predictors: Callable[[Schedule], Mapping[str, LinearPredictor | SolverPredictor]]
    judge: Judge | None = None
    euler: Judge | None = None


@dataclass(frozen=True)
class _Cost:
    """Calls of the model, one for each step of a run."""

    form: Form
    target: Target
    runs: int
    steps: int

    @property
    def references(self) -> int:
        """What the unaccelerated runs take."""
        if self.form is not Form.solver:
            return max(1, self.runs // 2) * self.steps
        return self.runs * self.steps * (1 if self.target is Target.plain else 1 + _PARTS)

    def placement(self, calls: int) -> int:
        """What judging a placement takes at most."""
        if self.form is Form.solver:
            return self.runs * calls * (2 if self.runs < _FEW_RUNS else 1)
        # The fit samples its runs in full, and in each round up to the end of one segment after the other.
        of_run = self.steps + _ROUNDS_TO_TRY * calls * (calls + 1) // 2
        return (self.runs - self.runs // 2) * of_run + max(1, self.runs // 2) * calls

    def curve(self, numbers: Sequence[int]) -> int:
        """What the curve takes at most: evenly spaced placements, those like the best, and Euler's method."""
        return sum(2 * self.placement(count) + self.runs * count for count in numbers)


def _fits(
    make: Callable[[], _Fits], cost: _Cost, calls: int | None, search: int, numbers: Sequence[int], console: Console
) -> _Fits:
    """Sample the unaccelerated runs, and say what the search takes before and after; not where the calls are sought."""
    if not search:
        return make()
    if calls is None:
        console.print(f"calls of the model, one for each step of a run: {cost.references} before the search")
        return make()
    placements, curve = search * cost.placement(calls), cost.curve(numbers)
    console.print(
        f"calls of the model, one for each step of a run: {cost.references} before the search, at most {placements} "
        f"for {search} placements of {calls} full steps" + (f" and {curve} for the curve" if numbers else ""),
        soft_wrap=True,
    )
    if cost.runs < _FEW_RUNS:
        console.print(
            f"{cost.runs} prompts are too few for a search, which would find what suits these alone: only evenly "
            f"spaced full steps are tried; give {_FEW_RUNS} or more",
            soft_wrap=True,
        )
    begin = time.monotonic()
    made = make()
    seconds = (time.monotonic() - begin) / cost.references
    console.print(f"{seconds:.3g} s a call: at most {seconds * (placements + curve) / 60:.1f} min to the final fit")
    return made


def _solver(source: TrajectorySource, target: TrajectorySource | None, batch: int, search: int) -> _Fits:
    """Fit learned solvers."""
    fits = SolverFits(source, held_out=len(source) // 2 if search else 0, target=target, batch=batch)

    def predictors(schedule: Schedule) -> dict[str, SolverPredictor]:
        if search:
            fits.include_held_out()
        return {ONLY_BRANCH: fits.fit(schedule)}

    if not search:
        return _Fits(predictors)
    judge = fits.cross_validated_db if len(source) < _FEW_RUNS else fits.psnr_db
    return _Fits(predictors, judge, fits.eulers().psnr_db)


def _through_tail(source: TrajectorySource, batch: int, search: int) -> _Fits:
    """Fit coefficients of features."""

    def predictors(schedule: Schedule) -> Mapping[str, LinearPredictor]:
        fitted = fit(source, schedule, batch=batch)
        return {ONLY_BRANCH: fitted} if isinstance(fitted, LinearPredictor) else fitted

    if not search:
        return _Fits(predictors)
    half = len(source) - len(source) // 2
    fitted_to = SelectedRuns(source, range(half))
    others = SelectedRuns(source, range(half, len(source))) if half < len(source) else fitted_to
    evaluator = Evaluator(others, batch=batch)

    def judge(schedule: Schedule) -> float:
        tried = fit(fitted_to, schedule, rounds=_ROUNDS_TO_TRY, batch=batch, progress=False)
        return evaluator(tried, schedule)

    return _Fits(predictors, judge)


def _placement(
    fits: _Fits, sigmas: Sequence[float], calls: int, psnr_db: float | None, search: int, console: Console
) -> Schedule:
    """Return where the calls go."""
    starts = even_schedules(sigmas, calls)
    if fits.judge is None:
        schedule = starts[0]
    else:
        if psnr_db is None:
            found = search_schedule(fits.judge, starts[:search], placements=search)
        else:
            found = fewest_calls(fits.judge, sigmas, psnr_db, placements=search)
        schedule = found.schedule
        console.print(f"the best of {found.placements} placements: {found.psnr_db:.2f} dB")
    console.print(common.full_steps(schedule), soft_wrap=True)
    return schedule


def _draw_curve(
    fits: _Fits, sigmas: Sequence[float], numbers: Sequence[int], best: Schedule, file: Path, console: Console
) -> None:
    """Draw dB over calls: evenly spaced, placed like the best, and by Euler's method."""
    calls = len(best.full_steps)
    asked = {
        f"placed like the best of {calls}": (fits.judge, best),
        "evenly spaced": (fits.judge, None),
        "Euler's method, as many steps": (fits.euler, None),
    }
    curves = {}
    for name, (judge, like) in asked.items():
        if judge is not None:
            found = quality_curve(judge, sigmas, numbers, like=like, placements=1)
            curves[name] = {count: each.psnr_db for count, each in found.items()}
            of_count = ", ".join(f"{count}: {value:.1f}" for count, value in curves[name].items())
            console.print(f"dB by calls, {name}: {of_count}", soft_wrap=True)
    plot_curve(curves, file, chosen=calls)
    console.print(f"no budget was given: {calls} calls are a fifth of the steps; {file} shows others", soft_wrap=True)

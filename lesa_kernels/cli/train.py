"""Runs `lesa train`: trains a LESA predictor as in the paper, while the pipeline samples."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from lesa_kernels.cli import common
from lesa_kernels.predictors import LesaPredictor
from lesa_kernels.predictors.lesa import PUBLISHED_STAGES
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import FeatureStore, TrainingConfig
from lesa_kernels.training import train as train_predictor
from lesa_kernels.training.progress import waiting
from lesa_kernels.trajectories import TrajectorySource

# Published for Qwen-Image, whose guidance has branches.
_STAGES_OF_BRANCHES = ((0.9, 4), (0.4, 8), (0.0, 8))
_STORE_DTYPE = "float16"
_TRAINING = "Training"


class Recipe(str, Enum):
    """Hyper-parameters of the training."""

    tuned = "tuned"
    published = "published"


def train(
    model: common.Model,
    prompts: common.Prompts,
    out: common.Out,
    recipe: Annotated[
        Recipe,
        typer.Option(
            help="tuned: a rate of 1e-3, six epochs. published: the paper's 1e-4, three epochs.",
            rich_help_panel=_TRAINING,
        ),
    ] = Recipe.tuned,
    interval: Annotated[
        int,
        typer.Option(
            help="The blocks run on every n-th step, after four at the start.", min=1, rich_help_panel=_TRAINING
        ),
    ] = 7,
    store: Annotated[
        Path | None,
        typer.Option(help="Folder for features: sample each run once, learn from the disk.", rich_help_panel=_TRAINING),
    ] = None,
    steps: common.Steps = 50,
    settings: common.Settings = None,
    batch: common.Batch = 1,
    seed: common.Seed = 0,
    capture: common.Capture = None,
    device: common.Device = None,
    dtype: common.Dtype = None,
    offload: common.Offload = False,
) -> None:
    """Train a LESA predictor as in the paper, while the pipeline samples.

    The same command continues a stopped training. `lesa calibrate` gives better images where it can be used.
    """
    with common.command("Interrupted: the same command goes on where it was stopped."):
        common.check_modules("lesa train", "diffusers", "matplotlib")
        console = common.make_console()
        place = common.place(device)
        pipeline = common.Pipeline(model, prompts, steps, settings, seed, capture, place, dtype, offload)
        runs = pipeline.source(console)
        with waiting("running the first step to find the branches of guidance", not console.quiet):
            # Further calls of a step, without a name of their own, find the predictor of the first one.
            branches = tuple(branch for branch in runs.branches if branch.isidentifier())
        source: TrajectorySource = runs
        if store is not None:
            FeatureStore.record(store, runs, dtype=_STORE_DTYPE, model=runs.model, progress=not console.quiet)
            source = FeatureStore(store, model=runs.model, sigmas=runs.sigmas, device=place)
        torch.manual_seed(seed)
        stages = PUBLISHED_STAGES if len(branches) == 1 else _STAGES_OF_BRANCHES
        predictors = {branch: LesaPredictor(steps, stages).to(place) for branch in branches}
        wanted = Schedule.interval(steps, interval)
        schedule = Schedule(steps, predictors[branches[0]].plan(runs.sigmas, wanted).full_steps)
        more = len(schedule.full_steps) - len(wanted.full_steps)
        console.print(
            f"branches {' and '.join(branches)}; {common.full_steps(schedule)}"
            + (f"; {more} more than the interval needs, until the predictor's windows are full" if more else ""),
            soft_wrap=True,
        )
        preset = TrainingConfig.tuned() if recipe is Recipe.tuned else TrainingConfig.published()
        config = replace(preset, batch_size=batch, seed=seed)
        result = train_predictor(
            predictors, source, schedule, config, out=out, progress=not console.quiet, description="LESA"
        )
        if console.quiet:
            return
        console.print(f"{result.updates} updates in {result.seconds:.0f} s")
        for phase, values in result.losses.items():
            if values:
                console.print(f"{phase}: loss {values[0]:.4g} in the first batch, {values[-1]:.4g} in the last")
        common.show_files(out, console)
        console.print(
            "\n" + pipeline.next_lines(common.loading(branches, out)), markup=False, highlight=False, soft_wrap=True
        )

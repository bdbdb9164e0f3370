"""Runs the demo: trains LESA predictors for the digits model, then compares all methods on unseen noise."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from rich.console import Console
from torch import Tensor

from examples.digits import comparison, figures
from examples.digits.comparison import PUBLISHED, UNIFORM, Method, Outcome
from examples.digits.model import NUM_CLASSES, initial_noise, load_model, sample, scheduler, set_up
from examples.digits.solvers import solve
from lesa_kernels.integrations import recorded
from lesa_kernels.machine import one_thread
from lesa_kernels.predictors import LesaPredictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import RecordedSource, TrainingConfig, TrainingResult, plot_losses, train
from lesa_kernels.training.progress import progress_bar, waiting
from lesa_kernels.training.ranks import lock_folder

STEPS = 50
CONVERGED_STEPS = 200
# Seeds of the noise: what is compared must never have been trained on.
TRAINING_SEED = 1_000
UNSEEN_SEED = 0


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo.

    Args:
        out: folder for all that it writes.
        device: "cpu" or "cuda".
        samples: unseen samples to compare on, at least 10.
        calls: numbers of block calls at which all methods are compared, LESA included.
        extra_calls: numbers at which only what needs no training is, for the plot.
        trajectories: unaccelerated runs to train on.
        batch: samples in each of them.
        seed: of the predictors' first weights.
        training: hyper-parameters.
    """

    out: Path
    device: str = "cpu"
    samples: int = 64
    calls: tuple[int, ...] = (10, 8)
    extra_calls: tuple[int, ...] = (13, 6)
    trajectories: int = 12
    batch: int = 20
    seed: int = 0
    training: TrainingConfig = field(default_factory=TrainingConfig.tuned)


def run_demo(config: DemoConfig, console: Console) -> list[figures.Row]:
    """Run the demo; write `results.json`, `images.png`, `quality.png`, `loss.png` and the predictors to `config.out`.

    Args:
        config: sizes and places.
        console: where progress and the table go.

    Returns:
        The measured rows.

    Raises:
        ValueError: when there are fewer than 10 samples.
        BlockingIOError: when another process writes to `config.out`.
        OSError: when `config.out` cannot be written to, before anything is sampled.
        RuntimeError: when the device is not there.
    """
    if config.samples < NUM_CLASSES:
        raise ValueError(f"samples must be at least {NUM_CLASSES} (one of each class is shown), got {config.samples}")
    with lock_folder(config.out), one_thread():
        return _run(config, console)


def _run(config: DemoConfig, console: Console) -> list[figures.Row]:
    """Train, compare, and write the results."""
    begin = time.perf_counter()
    with waiting("loading the digits model", not console.quiet):
        model = load_model(config.device)
    sigmas = set_up(scheduler(), STEPS).tolist()
    predictors = _train_predictors(model, sigmas, config, console)
    noise, labels = _inputs(config.samples, UNSEEN_SEED, config.device)
    sample(model, noise[:2], labels[:2], num_steps=2)
    reference, converged = _references(model, noise, labels, sigmas, console)
    reference_row = _row(Method("no cache", "every step", _all_steps()), reference, reference, converged)
    rows, pictures = _compare(model, noise, labels, sigmas, predictors, config, (reference, converged), console)
    shown = [row for row in rows if row.block_calls in config.calls]
    console.print(figures.table(shown, reference_row, config.samples))
    settings = {
        "samples": config.samples,
        "machine": figures.machine(torch.device(config.device)),
        "command": _command(),
    }
    figures.write_json(config.out / "results.json", rows, reference_row, settings)
    with waiting("drawing", not console.quiet):
        figures.draw_images(config.out / "images.png", pictures, reference.images)
        figures.draw_quality(config.out / "quality.png", rows)
    console.print(
        f"{time.perf_counter() - begin:.0f} s in all. Pictures: [bold]{config.out / 'images.png'}[/], "
        f"{config.out / 'quality.png'}, {config.out / 'loss.png'}; figures: {config.out / 'results.json'}; "
        f"predictors: {config.out / 'predictors'}"
    )
    return rows


def _inputs(count: int, seed: int, device: str) -> tuple[Tensor, Tensor]:
    """Return noise and a label of each sample."""
    return initial_noise(count, seed, device), (torch.arange(count) % NUM_CLASSES).to(device)


def _command() -> str:
    """Return the command that runs."""
    return " ".join(["python -m examples.digits", *sys.argv[1:]])


def _all_steps() -> Schedule:
    """Return the schedule that forecasts nothing."""
    return Schedule.explicit(STEPS, range(STEPS))


def _train_predictors(
    model: FluxTransformer2DModel, sigmas: list[float], config: DemoConfig, console: Console
) -> dict[tuple[int, str], LesaPredictor]:
    """Record unaccelerated runs, train and save a predictor for each schedule that LESA can use, plot the losses."""
    trajectories = []
    with progress_bar(not console.quiet) as bar:
        for index in bar.track(range(config.trajectories), description="recording unaccelerated runs to train on"):
            noise, labels = _inputs(config.batch, TRAINING_SEED + index, config.device)
            with recorded(model) as features:
                sample(model, noise, labels, num_steps=STEPS)
            trajectories.append(features)
    predictors: dict[tuple[int, str], LesaPredictor] = {}
    results: dict[str, TrainingResult] = {}
    for calls in config.calls:
        for schedule_name, schedule in comparison.schedules(sigmas, calls).items():
            if schedule_name == UNIFORM:
                # Steps 1 and 2 would be forecasts there, and LESA's first stage needs four features.
                continue
            torch.manual_seed(config.seed)
            predictor = LesaPredictor(num_steps=STEPS).to(config.device)
            name = f"{calls} calls, {schedule_name}"
            results[name] = train(
                predictor,
                RecordedSource(trajectories, sigmas),
                schedule,
                config.training,
                progress=not console.quiet,
                description=f"LESA, {name}",
            )
            short = "published" if schedule_name == PUBLISHED else "uniform"
            predictor.save_pretrained(config.out / "predictors" / f"{calls}-calls-{short}")
            predictors[calls, schedule_name] = predictor
    with waiting("drawing", not console.quiet):
        plot_losses(results, config.out / "loss.png")
    return predictors


def _references(
    model: FluxTransformer2DModel, noise: Tensor, labels: Tensor, sigmas: list[float], console: Console
) -> tuple[Outcome, Tensor]:
    """Return the unaccelerated run, and the images that a far finer second-order solution gives."""
    with waiting(f"sampling all {STEPS} steps, and {CONVERGED_STEPS} of a second-order solver", not console.quiet):
        reference = comparison.run(model, noise, labels, sigmas, None)
        fine = set_up(scheduler(), CONVERGED_STEPS).tolist()
        return reference, solve(model, noise, labels, fine, order=2).cpu()


def _row(method: Method, outcome: Outcome, reference: Outcome, converged: Tensor) -> figures.Row:
    """Measure what a method gave."""
    quality, error = comparison.psnr(outcome.images, reference.images)
    features = None
    if method.predictor is not None:
        features = comparison.feature_error(outcome.features, reference.features, method.schedule)
    return figures.Row(
        method=method.name,
        schedule=method.schedule_name,
        full_steps=method.schedule.full_steps,
        block_calls=outcome.block_calls,
        seconds=outcome.seconds,
        psnr=quality,
        psnr_error=error,
        psnr_converged=comparison.psnr(outcome.images, converged)[0],
        feature_error=features,
    )


def _compare(
    model: FluxTransformer2DModel,
    noise: Tensor,
    labels: Tensor,
    sigmas: list[float],
    predictors: dict[tuple[int, str], LesaPredictor],
    config: DemoConfig,
    references: tuple[Outcome, Tensor],
    console: Console,
) -> tuple[list[figures.Row], dict[str, dict[int, tuple[Tensor, figures.Row]]]]:
    """Run every method; keep the pictures of those that the figure shows."""
    counts = sorted({*config.calls, *config.extra_calls}, reverse=True)
    todo = [method for calls in counts for method in comparison.methods(sigmas, calls, predictors)]
    rows: list[figures.Row] = []
    pictures: dict[str, dict[int, tuple[Tensor, figures.Row]]] = {}
    with progress_bar(not console.quiet) as bar:
        for method in bar.track(todo, description="sampling unseen noise by every method"):
            outcome = comparison.run(model, noise, labels, sigmas, method)
            rows.append(_row(method, outcome, *references))
            if method.calls in config.calls:
                label = f"{method.name}\n{method.schedule_name}"
                pictures.setdefault(label, {})[method.calls] = (outcome.images, rows[-1])
    return rows, pictures

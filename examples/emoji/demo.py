"""Runs the demo: fits the learned solver to the emoji model, then compares it with other methods on unseen noise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.quality.forecasters import spectrum_schedule
from benchmarks.quality.measures import psnr, ssim
from examples.emoji import emoji_model as emoji
from examples.emoji import figures, prompts
from examples.emoji.emoji_pipeline import EmojiPipeline
from examples.emoji.prepare import INTERVALS, LESA, STEPS, known_runs
from lesa_kernels.integrations import enabled, summary
from lesa_kernels.machine import one_thread
from lesa_kernels.predictors import Predictor, SolverPredictor, Spectrum, TaylorSeer, load_predictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import SolverFits
from lesa_kernels.training.progress import progress_bar, waiting
from lesa_kernels.training.ranks import lock_folder

PLACEMENTS = {
    10: (0, 5, 10, 17, 21, 26, 32, 37, 43, 47),
    8: (0, 6, 13, 21, 28, 35, 42, 47),
    6: (0, 11, 21, 30, 39, 46),
}
"""Calls -> full steps of the learned solver, as `python -m examples.emoji.prepare placements` printed them."""
CONVERGED_STEPS = 200
SHOWN_CALLS = 8
"""Calls of the picture."""


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the demo.

    Args:
        out: folder for all that it writes.
        device: "cpu" or "cuda".
        samples: unseen samples to compare on.
        runs: runs that the learned solver is fitted to.
        calls: numbers of calls of the blocks to compare at; of those of `PLACEMENTS`.
        converged_steps: of the run that counts as the solution.
    """

    out: Path
    device: str = "cpu"
    samples: int = 32
    runs: int = 16
    calls: tuple[int, ...] = (10, 8, 6)
    converged_steps: int = CONVERGED_STEPS


@dataclass(frozen=True)
class Method:
    """One method at its own placement of the full steps.

    Args:
        name: what it is called.
        placement: what its placement is called.
        schedule: the steps on which the blocks run.
        predictor: makes the other steps; None for a solver that takes only these.
        order: of the solver.
    """

    name: str
    placement: str
    schedule: Schedule
    predictor: Predictor | None = None
    order: Literal[1, 2] = 1


class Samples:
    """Unseen noise, and what becomes of it.

    Args:
        pipe: the pipeline.
        count: how many samples.
    """

    def __init__(self, pipe: EmojiPipeline, count: int) -> None:
        self.prompts = prompts.compared_prompts(count)
        self.noise = emoji.initial_noise(count, prompts.UNSEEN_SEED, pipe.device)
        self._pipe = pipe

    def plain(self) -> Tensor:
        """Sample with all steps in full, or with whatever is enabled: [B, 3, 32, 32]."""
        images: Tensor = self._pipe(
            self.prompts, latents=self.noise, num_inference_steps=STEPS, output_type="latent"
        ).images
        return images

    def solved(self, sigmas: list[float], order: Literal[1, 2]) -> Tensor:
        """Sample by a solver over some noise levels."""
        return emoji.solve(self._pipe.transformer, self.noise, self.prompts, sigmas, order)

    def by(self, method: Method) -> Tensor:
        """Sample by a method.

        Raises:
            RuntimeError: when the predictor was not used.
        """
        if method.predictor is None:
            sigmas = emoji.set_up(STEPS)
            return self.solved([*(sigmas[step] for step in method.schedule.full_steps), sigmas[-1]], method.order)
        with enabled(self._pipe, method.predictor, method.schedule):
            images = self.plain()
            if (refused := summary(self._pipe).refused) is not None:
                raise RuntimeError(f"{method.name} was sampled without forecasts: {refused}")
        return images


def methods(calls: int, learned: SolverPredictor) -> list[Method]:
    """Return what is compared at a number of calls, each with its own placement of them.

    Args:
        calls: 10, 8 or 6.
        learned: the fitted solver.
    """
    uniform = Schedule.uniform_in_sigma(emoji.set_up(STEPS), calls)
    published = Schedule.interval(STEPS, INTERVALS[calls])
    return [
        Method(figures.BEST, "searched", learned.schedule, learned),
        Method("LESA as published", "published rule", published, load_predictor(LESA / f"{calls}-calls")),
        Method("Spectrum", "published rule", spectrum_schedule(STEPS, calls), Spectrum()),
        Method("TaylorSeer", "even in sigma", uniform, TaylorSeer(1)),
        Method("Adams-Bashforth 2", "even in sigma", uniform, order=2),
        Method("Euler", "even in sigma", uniform, order=1),
    ]


def run_demo(config: DemoConfig, console: Console) -> list[figures.Row]:
    """Run the demo; write `results.json`, `images.png`, `quality.png` and the fitted predictors to `config.out`.

    Args:
        config: sizes and places.
        console: where progress and the table go.

    Returns:
        The measured rows.

    Raises:
        BlockingIOError: when another process writes to `config.out`.
        OSError: when `config.out` cannot be written to, before anything is sampled.
        ValueError: when a number of calls has no placement.
    """
    if unknown := [calls for calls in config.calls if calls not in PLACEMENTS]:
        raise ValueError(f"calls must be of {sorted(PLACEMENTS)}, got {unknown[0]}")
    with lock_folder(config.out), one_thread():
        return _run(config, console)


def _run(config: DemoConfig, console: Console) -> list[figures.Row]:
    """Sample, fit, compare, and write the results."""
    began, begin = time.perf_counter(), _now(config.device)
    with waiting("loading the emoji model", not console.quiet):
        pipe = EmojiPipeline.load(config.device)
        pipe.set_progress_bar_config(disable=True)
    samples = Samples(pipe, config.samples)
    # What is called for the first time takes longer.
    samples.solved(emoji.set_up(3), 1)
    with waiting(f"plain run: {config.samples} unseen samples, all {STEPS} steps", not console.quiet):
        plain, seconds, calls = _measured(pipe, samples.plain)
    with waiting(f"the solution: {config.converged_steps} steps of second order", not console.quiet):
        converged = samples.solved(emoji.set_up(config.converged_steps), 2).cpu()
    every = tuple(range(STEPS))
    # The quicker of two counts: the first may have shared its core.
    with waiting("plain run, once more", not console.quiet):
        seconds = min(seconds, _measured(pipe, samples.plain)[1])
    plain_row = figures.Row(
        "plain", "every step", every, calls, seconds, 1.0, None, None, None, psnr(plain, converged)[0]
    )
    learned, fit = _fit(config, console)
    todo = [method for calls in config.calls for method in methods(calls, learned[calls])]
    rows: list[figures.Row] = []
    pictures: list[Tensor] = []
    with progress_bar(not console.quiet) as bar:
        for method in bar.track(todo, description="sampling the same noise by every method"):
            images, seconds, calls = _measured(pipe, partial(samples.by, method))
            rows.append(_row(method, images, seconds, calls, plain, converged, plain_row.seconds))
            pictures.append(images)
    console.print(figures.table(rows, plain_row, config.samples))
    for calls, predictor in learned.items():
        predictor.save_pretrained(config.out / "predictors" / f"{calls}-calls")
    settings = {
        "samples": config.samples,
        "prompts": samples.prompts,
        "converged_steps": config.converged_steps,
        "clock": _clock(config.device),
        "machine": figures.machine(torch.device(config.device)),
        "command": " ".join(["python -m examples.emoji", *sys.argv[1:]]),
        "fit": fit,
        "seconds": _now(config.device) - begin,
    }
    figures.write_json(config.out / "results.json", rows, plain_row, settings)
    with waiting("drawing", not console.quiet):
        _draw(config.out, samples.prompts, plain, rows, pictures)
    console.print(
        f"{time.perf_counter() - began:.0f} s in all. Pictures: [bold]{config.out / 'images.png'}[/], "
        f"{config.out / 'quality.png'}; figures: {config.out / 'results.json'}; fits: {config.out / 'predictors'}",
        soft_wrap=True,
    )
    return rows


def _clock(device: str) -> str:
    """Say what work is timed by: one thread's own time does not depend on what else the machine does."""
    return "processor time" if device == "cpu" else "wall clock"


def _now(device: str) -> float:
    """Return the seconds of that clock."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def _measured(pipe: EmojiPipeline, sample: Callable[[], Tensor]) -> tuple[Tensor, float, int]:
    """Return what a run gives, on the CPU, its seconds, and how often the blocks ran."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    device = pipe.device.type
    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(count)
    try:
        begin = _now(device)
        # Copying waits for the device.
        images = sample().cpu()
        return images, _now(device) - begin, calls
    finally:
        handle.remove()


def _fit(config: DemoConfig, console: Console) -> tuple[dict[int, SolverPredictor], dict[str, Any]]:
    """Fit the learned solver for each number of calls; say what it takes."""
    console.print(f"fitting the {figures.BEST} to {config.runs} runs of other prompts")
    begin = _now(config.device)
    fits = SolverFits(known_runs(config.runs, config.device), batch=config.runs, progress=not console.quiet)
    learned = {}
    for calls in config.calls:
        schedule = Schedule(STEPS, PLACEMENTS[calls])
        learned[calls] = fits.fit(schedule, progress=not console.quiet)
        console.print(
            f"{calls:2d} calls at {' '.join(map(str, schedule.full_steps))}: "
            f"{int(learned[calls].coefficients.count_nonzero())} coefficients"
        )
    taken = {"runs": config.runs, "model_calls": fits.model_calls, "seconds": _now(config.device) - begin}
    console.print(f"fitted: {taken['model_calls']} calls of the model for single samples, {taken['seconds']:.1f} s")
    return learned, taken


def _row(
    method: Method,
    images: Tensor,
    seconds: float,
    calls: int,
    plain: Tensor,
    converged: Tensor,
    plain_seconds: float,
) -> figures.Row:
    """Measure what a method gave."""
    quality, error = psnr(images, plain)
    return figures.Row(
        method=method.name,
        schedule=method.placement,
        full_steps=method.schedule.full_steps,
        block_calls=calls,
        seconds=seconds,
        speedup=plain_seconds / seconds,
        psnr=quality,
        psnr_error=error,
        ssim=ssim(images, plain),
        psnr_converged=psnr(images, converged)[0],
    )


def _draw(out: Path, names: list[str], plain: Tensor, rows: list[figures.Row], pictures: list[Tensor]) -> None:
    """Draw the pictures."""
    calls = SHOWN_CALLS if any(row.block_calls == SHOWN_CALLS for row in rows) else rows[0].block_calls
    shown = min(len(prompts.SHOWN), len(names))
    lines = [
        (f"{row.method}\n{row.psnr:.1f} dB", pictures[rows.index(row)][:shown])
        for row in figures.best_first(rows, calls)
    ]
    title = f"{calls} calls\ninstead of {STEPS}"
    figures.draw_images(out / "images.png", title, names[:shown], plain[:shown], lines)
    figures.draw_quality(out / "quality.png", rows)

"""LESA's own form fitted to coefficients: its weights, biases and KANs reproduce what a fit through the tail found.

Composed over a segment, LESA's recursion is a combination of full features like any other. Its parameters are moved, by
gradient descent on a few small matrices and without touching a feature, to where these combinations cost least: the
distance to the fitted ones is measured by the matrices J'J that the fit itself minimised.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lesa_kernels.predictors import LesaPredictor, LinearPredictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.sources import Source
from lesa_kernels.training.damped import DampedFit
from lesa_kernels.training.players import batches, reference_latents
from lesa_kernels.training.progress import progress_bar
from lesa_kernels.training.through_tail import collect_segment, segments

# Weighs deviations that the tail hardly notices, relative to the others: the matrices hold for small ones only.
_TIE = 0.3


def segment_stages(sigmas: Sequence[float], schedule: Schedule, window: int = 8) -> tuple[tuple[float, int], ...]:
    """Return stages for a `LesaPredictor` such that every segment has an expert of its own, whose window is filled.

    Args:
        sigmas: S+1 falling noise levels.
        schedule: its full steps.
        window: most features that an expert reads, K.

    Returns:
        (threshold, K) of each segment that has forecasts.
    """
    return tuple(
        (0.0 if segment.end == schedule.num_steps else float(sigmas[segment.end]), min(window, segment.full_step + 1))
        for segment in segments(schedule)
        if segment.steps
    )


def composed(predictor: LesaPredictor, sigmas: Sequence[float], schedule: Schedule) -> dict[int, Tensor]:
    """Return every forecast as a combination of full features, differentiable in the predictor's parameters.

    Args:
        predictor: whose plan has the schedule's full steps.
        sigmas: S+1 noise levels.
        schedule: its full steps.

    Returns:
        Step -> float64 [J + 1]: coefficients of the J full features of the schedule, and of the constant 1.
    """
    size = len(schedule.full_steps) + 1
    known = {full: torch.eye(size, dtype=torch.float64)[index] for index, full in enumerate(schedule.full_steps)}
    constant = torch.eye(size, dtype=torch.float64)[-1]
    steps = [step for step in range(schedule.num_steps) if step not in known]
    gains: dict[int, Tensor] = {}
    for stage in {predictor.stage(sigmas[step]) for step in steps}:
        own = [step for step in steps if predictor.stage(sigmas[step]) == stage]
        values = predictor.gain(sigmas, [sigmas[step] for step in own], stage).double().reshape(-1)
        gains.update(zip(own, values, strict=True))
    for step in steps:
        mixer = cast(nn.Linear, predictor.latent[predictor.stage(sigmas[step])])
        window = mixer.weight.shape[1]
        history = torch.stack([known[step - window + k] for k in range(window)])
        mixed = mixer.weight.double().reshape(-1) @ history + mixer.bias.double() * constant
        known[step] = known[step - 1] + gains[step] * mixed
    return {step: known[step] for step in steps}


def fit_lesa(
    predictor: LesaPredictor,
    fitted: LinearPredictor,
    source: Source,
    *,
    iterations: int = 1500,
    learning_rate: float = 1e-2,
    batch: int = 1,
    progress: bool = True,
) -> float:
    """Move a LESA predictor, in place, to the coefficients that a fit through the tail found.

    Args:
        predictor: float32, on the CPU; `segment_stages` gives stages that serve the schedule.
        fitted: of `fit_through_tail`; its schedule and sigmas are taken over.
        source: the runs of that fit, played once more.
        iterations: of Adam.
        learning_rate: its first one, falling along a cosine to nothing.
        batch: runs played at once.
        progress: show a bar.

    Returns:
        The squared error that is left, relative to that of doing nothing about the fitted coefficients' gain.

    Raises:
        ValueError: when the predictor's plan has other full steps than the schedule: a window is too long.
    """
    sigmas, schedule = fitted.trained_sigmas, fitted.schedule
    planned = predictor.plan(sigmas, schedule, on_other_sigmas="adapt").full_steps
    if planned != schedule.full_steps:
        raise ValueError(
            f"predictor must forecast wherever the schedule does (full steps {schedule.full_steps}), got {planned}; "
            "segment_stages(sigmas, schedule) gives windows that fit"
        )
    metrics = _metrics(source, fitted, batch, progress)
    wanted = _coefficients(fitted)
    optimiser = torch.optim.Adam(predictor.parameters(), lr=learning_rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, iterations)
    first = loss = torch.zeros(())
    with progress_bar(progress) as bar, torch.enable_grad():
        for iteration in bar.track(range(iterations), description="fitting LESA's form"):
            made = composed(predictor, sigmas, schedule)
            loss = torch.stack(
                [
                    difference @ metric @ difference
                    for steps, metric in metrics.items()
                    for difference in [torch.cat([made[step] - wanted[step] for step in steps])]
                ]
            ).sum()
            first = loss.detach() if iteration == 0 else first
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(predictor.parameters(), 1.0)
            optimiser.step()
            decay.step()
    predictor.trained_sigmas = sigmas
    predictor.trained_schedule = schedule
    return (loss / first).item()


def _coefficients(fitted: LinearPredictor) -> dict[int, Tensor]:
    """Return the rows of a predictor over all full features of its schedule and the constant."""
    full = fitted.schedule.full_steps
    rows = {}
    for step in range(fitted.schedule.num_steps):
        if step in full:
            continue
        row = torch.zeros(len(full) + 1, dtype=torch.float64)
        sources = fitted.sources(step)
        for source, value in zip(sources, fitted.coefficients[step][fitted.window - len(sources) :], strict=True):
            row[full.index(source)] = value
        row[-1] = fitted.offsets[step]
        rows[step] = row
    return rows


@torch.no_grad()
def _metrics(source: Source, fitted: LinearPredictor, batch: int, progress: bool) -> dict[tuple[int, ...], Tensor]:
    """Return for each segment's steps the matrix J'J over all full features, normalised by the segment's own error."""
    schedule, parts = fitted.schedule, batches(source, batch)
    todo = [segment for segment in segments(schedule) if segment.steps]
    rows = {
        step: {source: value.item() for source, value in zip(schedule.full_steps, row, strict=False) if value != 0}
        for step, row in _coefficients(fitted).items()
    }
    size = len(schedule.full_steps) + 1
    metrics = {}
    with progress_bar(progress) as bar:
        recording = bar.track(parts, description="sampling unaccelerated runs")
        references = [reference_latents(source, runs, [each.end for each in todo])[0] for runs in recording]
        for segment in bar.track(todo, description="measuring what each segment is sensitive to"):
            given = [full for full in schedule.full_steps if full <= segment.full_step]
            fit = DampedFit(torch.zeros(len(segment.steps) * len(given), dtype=torch.float64))
            collect_segment(source, schedule, rows, segment, parts, references, fit, lambda step, given=given: given)  # type: ignore[misc]
            fit.close_round()
            places = [
                position * size + schedule.full_steps.index(full)
                for position in range(len(segment.steps))
                for full in given
            ]
            whole = _TIE * fit.gram.diagonal().mean() * torch.eye(len(segment.steps) * size, dtype=torch.float64)
            whole[torch.tensor(places)[:, None], torch.tensor(places)] += fit.gram
            metrics[segment.steps] = whole / fit.error
    return metrics

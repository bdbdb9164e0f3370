"""LESA's own form fitted through the tail: weights and gains of each segment, found in closed loop.

Composed over a segment, LESA's recursion is a combination of full features like any other, only that fewer of them can
be made. So the fit is that of `fit_through_tail`, but each of its steps ends at the nearest coefficients that LESA can
make. Weights and gains are found without touching a feature; the KAN then takes the gains over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lesa_kernels.checks import check_decreasing, check_int, check_type
from lesa_kernels.predictors import LesaPredictor, LinearPredictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.training.damped import DampedFit
from lesa_kernels.training.expert import Expert
from lesa_kernels.training.kan_gains import set_gains
from lesa_kernels.training.policies import Reference, batches, reference_run
from lesa_kernels.training.progress import progress_bar
from lesa_kernels.training.through_tail import Segment, collect_segment, segments
from lesa_kernels.trajectories import TrajectorySource, check_source


def segment_stages(sigmas: Sequence[float], schedule: Schedule, window: int = 8) -> tuple[tuple[float, int], ...]:
    """Return stages for a `LesaPredictor` such that every segment has an expert of its own, whose window is filled.

    Args:
        sigmas: S+1 falling noise levels.
        schedule: its full steps.
        window: most features that an expert reads, K.

    Returns:
        (threshold, K) of each segment that has forecasts.

    Raises:
        TypeError: for something else than numbers, a schedule and an integer.
        ValueError: when the sigmas do not fall or are not those of the schedule, or the window is empty.
    """
    levels, window = check_decreasing(sigmas), check_int("window", window, 1)
    check_type("schedule", schedule, Schedule, "a Schedule")
    if schedule.num_steps != len(levels) - 1:
        raise ValueError(f"schedule must have {len(levels) - 1} steps (those of the sigmas), got {schedule.num_steps}")
    return tuple(
        (0.0 if segment.end == schedule.num_steps else levels[segment.end], min(window, segment.full_step + 1))
        for segment in segments(schedule)
        if segment.steps
    )


@torch.no_grad()
def fit_lesa(
    predictor: LesaPredictor,
    fitted: LinearPredictor,
    source: TrajectorySource,
    *,
    rounds: int = 5,
    batch: int = 1,
    progress: bool = True,
) -> None:
    """Fit a LESA predictor, in place, through the model's tail, as `fit_through_tail` does without LESA's form.

    Segment after segment, in closed loop: each begins with what comes nearest to the fitted coefficients, near in what
    the tail notices of them. Biases become zero.

    Args:
        predictor: float32, on the CPU; `segment_stages` gives stages that serve the schedule.
        fitted: of `fit_through_tail`; its schedule and sigmas are taken over.
        source: the runs of that fit.
        rounds: passes over the runs for each segment, at least 2.
        batch: runs sampled as one batch.
        progress: show a bar.

    Raises:
        ValueError: when rounds are fewer than 2, the predictor is not on the CPU or has other than a stage for each
            segment, or its plan other full steps than the schedule: a window is too long. And as `fit_through_tail`.
        TypeError: when its parameters are not float32, or an argument is of another type.
        FloatingPointError: as `fit_through_tail`.
    """
    check_type("predictor", predictor, LesaPredictor, "a LesaPredictor")
    check_type("fitted", fitted, LinearPredictor, "a LinearPredictor")
    check_source(source)
    for name, parameter in predictor.named_parameters():
        if parameter.dtype != torch.float32:
            raise TypeError(f"{name} of predictor must be float32, got {parameter.dtype}")
        if parameter.device.type != "cpu":
            raise ValueError(f"{name} of predictor must be on the CPU while it is fitted, got {parameter.device}")
    # One to measure, one to judge a change.
    rounds = check_int("rounds", rounds, 2)
    sigmas, schedule = fitted.trained_sigmas, fitted.schedule
    todo = [segment for segment in segments(schedule) if segment.steps]
    served = [{predictor.stage(sigmas[step]) for step in segment.steps} for segment in todo]
    planned = predictor.plan(sigmas, schedule, on_other_sigmas="adapt").full_steps
    if planned != schedule.full_steps or served != [{stage} for stage in range(len(predictor.stages))]:
        raise ValueError(
            f"predictor must have a stage for each segment between full steps {schedule.full_steps}, and forecast "
            f"wherever they do, got stages {predictor.stages} and full steps {planned}; "
            "segment_stages(sigmas, schedule) gives stages that fit"
        )
    form = _Form(fitted, source, batch)
    with progress_bar(progress) as bar:
        form.record(bar.track(form.parts, description="sampling unaccelerated runs"))
        for stage, segment in enumerate(bar.track(todo, description="fitting LESA's form")):
            expert = form.fit(segment, predictor.stages[stage][1], rounds)
            mixer = cast(nn.Linear, predictor.latent[stage])
            mixer.weight.copy_(expert.weights)
            mixer.bias.zero_()
            gains = set_gains(predictor, sigmas, stage, segment.steps, expert.gains)
            form.keep(segment, expert.compose(mixer.weight.double().reshape(-1), gains))
    predictor.trained_sigmas = sigmas
    predictor.trained_schedule = schedule


class _Form:
    """Forecasts as combinations of full features: those that were aimed at, those found for earlier segments.

    Args:
        fitted: the aims.
        source: of runs.
        batch: runs sampled as one batch.
    """

    def __init__(self, fitted: LinearPredictor, source: TrajectorySource, batch: int) -> None:
        self._source = source
        self._schedule = fitted.schedule
        self.parts = batches(source, batch)
        self._references: list[Reference] = []
        self._known = {full: {full: 1.0} for full in self._schedule.full_steps}
        self._aim = fitted.rows(fitted.trained_sigmas)

    def record(self, parts: Iterable[Sequence[int]]) -> None:
        """Sample unaccelerated runs and keep where the segments should end."""
        ends = [segment.end for segment in segments(self._schedule)]
        self._references = [reference_run(self._source, runs, ends) for runs in parts]

    def _given(self, segment: Segment) -> list[int]:
        return [full for full in self._schedule.full_steps if full <= segment.full_step]

    def _vector(self, row: Mapping[int, float], given: Sequence[int]) -> Tensor:
        return torch.tensor([row.get(full, 0.0) for full in given], dtype=torch.float64)

    def keep(self, segment: Segment, coefficients: Tensor) -> None:
        """Take a segment's coefficients [N * J] for those that its forecasts are made with."""
        given = self._given(segment)
        for step, row in zip(segment.steps, coefficients.reshape(-1, len(given)).tolist(), strict=True):
            self._known[step] = dict(zip(given, row, strict=True))

    def fit(self, segment: Segment, window: int, rounds: int) -> Expert:
        """Fit an expert to a segment, given those before it."""
        given = self._given(segment)
        before = range(segment.full_step - window + 1, segment.full_step + 1)
        expert = Expert(torch.stack([self._vector(self._known[step], given) for step in before]), len(segment.steps))
        aims = [self._aim(step, given) for step in segment.steps]
        if None in aims:
            raise ValueError(f"fitted must forecast all of {segment.name}, it has no coefficients for one of them")
        free = DampedFit(torch.cat([self._vector(aim.terms, given) for aim in aims if aim]), name=segment.name)
        self._measure(free, segment)
        fit = DampedFit(expert.nearest(free.best, free.damped_gram), expert.nearest, segment.name)
        for _ in range(rounds - 1):
            self._measure(fit, segment)
            if fit.finished:
                break
        expert.choose(fit.best)
        return expert

    def _measure(self, fit: DampedFit, segment: Segment) -> None:
        self.keep(segment, fit.candidate)
        rows = {step: row for step, row in self._known.items() if step not in self._schedule.full_steps}
        collect_segment(self._source, self._schedule, rows, segment, self.parts, self._references, fit)
        fit.close_round()

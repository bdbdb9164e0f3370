"""Lists and runs what the demo compares: predictors and solvers with the same full steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from examples.digits.model import sample, scheduler
from examples.digits.solvers import solve
from lesa_kernels.integrations import enabled, recorded
from lesa_kernels.predictors import LesaPredictor, Predictor, Reuse, TaylorSeer
from lesa_kernels.schedule import Schedule

PUBLISHED = "published rule"
UNIFORM = "uniform in sigma"
WARM_UNIFORM = "0-3, then uniform"

# Interval N of the published rule at 50 steps -> calls of the blocks.
INTERVALS = {13: 5, 10: 7, 8: 10, 6: 22}
WARMUP = 4


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Args:
        name: what it is called.
        schedule_name: what its schedule is called.
        schedule: the steps on which the blocks run.
        predictor: makes the other steps; None for a solver that takes only these.
        order: of the solver.
    """

    name: str
    schedule_name: str
    schedule: Schedule
    predictor: Predictor | None = None
    order: int = 1

    @property
    def calls(self) -> int:
        """Number of full steps."""
        return len(self.schedule.full_steps)


@dataclass(frozen=True)
class Outcome:
    """The images and measurements of a run.

    Args:
        images: [B, 28, 28], CPU.
        seconds: wall clock of the run.
        block_calls: how often the blocks ran, counted.
        features: of each step [B, T, C], where they were recorded.
    """

    images: Tensor
    seconds: float
    block_calls: int
    features: list[Tensor]


def schedules(sigmas: Sequence[float], calls: int) -> dict[str, Schedule]:
    """Return the schedules of so many full steps by name; the published rule only for counts that it can give."""
    found = {}
    if calls in INTERVALS:
        found[PUBLISHED] = Schedule.interval(len(sigmas) - 1, INTERVALS[calls])
    found[UNIFORM] = Schedule.uniform_in_sigma(sigmas, calls)
    if calls > WARMUP:
        found[WARM_UNIFORM] = Schedule.uniform_in_sigma(sigmas, calls, WARMUP)
    return found


def methods(sigmas: Sequence[float], calls: int, predictors: dict[tuple[int, str], LesaPredictor]) -> Iterator[Method]:
    """Yield all methods that are compared at a number of calls.

    LESA comes wherever a predictor was trained; the others with the published rule and uniform in sigma. They need
    no warm-up: the one that LESA's first four features force would only hurt them.
    """
    for name, schedule in schedules(sigmas, calls).items():
        if (calls, name) in predictors:
            yield Method("LESA", name, schedule, predictors[calls, name])
        if name == WARM_UNIFORM:
            continue
        yield Method("TaylorSeer 2, sigma", name, schedule, TaylorSeer(2, "sigma"))
        yield Method("TaylorSeer 2, steps", name, schedule, TaylorSeer(2, "step"))
        yield Method("reuse", name, schedule, Reuse())
        yield Method("Euler, fewer steps", name, schedule, order=1)
        yield Method("AB2, fewer steps", name, schedule, order=2)


def run(
    model: FluxTransformer2DModel, noise: Tensor, labels: Tensor, sigmas: Sequence[float], method: Method | None
) -> Outcome:
    """Sample by a method, None for all steps in full: once on the clock, once more to record the features."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    handle = model.transformer_blocks[0].register_forward_pre_hook(count)
    try:
        _synchronize(noise)
        begin = time.perf_counter()
        images = _sample(model, noise, labels, sigmas, method)
        _synchronize(noise)
        seconds = time.perf_counter() - begin
    finally:
        handle.remove()
    features: list[Tensor] = []
    if method is None or method.predictor is not None:
        with recorded(model) as features:
            _sample(model, noise, labels, sigmas, method)
    return Outcome(images.cpu(), seconds, calls, features)


def _sample(
    model: FluxTransformer2DModel, noise: Tensor, labels: Tensor, sigmas: Sequence[float], method: Method | None
) -> Tensor:
    """Sample images by a method."""
    if method is not None and method.predictor is None:
        levels = [sigmas[step] for step in method.schedule.full_steps] + [sigmas[-1]]
        return solve(model, noise, labels, levels, 2 if method.order == 2 else 1)
    driver = scheduler()
    hooked = nullcontext() if method is None else enabled(model, method.predictor, method.schedule, scheduler=driver)
    with hooked:
        return sample(model, noise, labels, num_steps=len(sigmas) - 1, scheduler=driver)


def _synchronize(tensor: Tensor) -> None:
    """Wait for the device of a tensor."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def psnr(images: Tensor, reference: Tensor) -> tuple[float, float]:
    """Peak signal-to-noise ratio, a mean over images and its standard error.

    Args:
        images: [B, ...], clamped here to [-1, 1] as a viewer would.
        reference: likewise.

    Returns:
        (mean, standard error) in dB.
    """
    difference = images.clamp(-1, 1).double() - reference.clamp(-1, 1).double()
    error = difference.square().flatten(1).mean(dim=1).clamp_min(1e-12)
    values = 10 * torch.log10(4.0 / error)
    spread = values.std().item() / len(values) ** 0.5 if len(values) > 1 else 0.0
    return values.mean().item(), spread


def feature_error(features: Sequence[Tensor], reference: Sequence[Tensor], schedule: Schedule) -> float:
    """Return the relative L2 error of the forecast features against the unaccelerated run's, a mean over steps."""
    steps = [step for step in range(schedule.num_steps) if step not in schedule.full_steps]
    errors = [(features[step] - reference[step]).norm() / reference[step].norm() for step in steps]
    return torch.stack(errors).mean().item() if errors else 0.0

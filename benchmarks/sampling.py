"""Times a whole sampling run of the digits model, plain and accelerated."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

import lesa_kernels as lesa
from benchmarks.clock import Clock
from benchmarks.harness import Case, Variant
from examples.digits.model import NUM_CLASSES, initial_noise, load_model, sample, scheduler, set_up
from lesa_kernels.ops import Tolerance
from lesa_kernels.predictors import Predictor
from lesa_kernels.schedule import Schedule

STEPS = 50
CALLS = 10
ACCELERATED, PLAIN, HOOKED = f"lesa.enable, {CALLS} of {STEPS} calls", "all calls", "all calls, through lesa.enable"

# Root mean square over pixels between -1 and 1. Forecasts change pictures a little; the same calls give the same ones.
NEAR, SAME = Tolerance(0.0, 0.1), Tolerance(0.0, 1e-4)


@torch.no_grad()
def sampling_case(images: int, clock: Clock, steps: int = STEPS) -> Case:
    """Sample digits with all calls of the transformer's blocks, and with a fifth of them (TaylorSeer in sigma)."""
    model = load_model(device=clock.device)
    noise = initial_noise(images, seed=0, device=clock.device)
    labels = torch.arange(images, device=clock.device) % NUM_CLASSES

    def run(predictor: Predictor | None, full: tuple[int, ...]) -> list[Tensor]:
        driver = scheduler()
        schedule = Schedule.explicit(steps, full)
        hooked = nullcontext() if predictor is None else lesa.enabled(model, predictor, schedule, scheduler=driver)
        with hooked:
            return [sample(model, noise, labels, num_steps=steps, scheduler=driver)]

    plain = sample(model, noise, labels, num_steps=steps)

    def difference(images: Tensor) -> Tensor:
        return (images - plain).square().mean().sqrt()

    every = tuple(range(steps))
    fifth = Schedule.uniform_in_sigma(set_up(scheduler(), steps).tolist(), CALLS).full_steps
    return Case(
        "sampling run",
        f"digits model, {images} images, {steps} steps",
        None,
        [torch.zeros((), device=clock.device)],
        [torch.ones((), device=clock.device)],
        [
            Variant(ACCELERATED, lambda turn: run(lesa.TaylorSeer(2), fifth), NEAR),
            Variant(PLAIN, lambda turn: run(None, every), SAME),
            Variant(HOOKED, lambda turn: run(lesa.TaylorSeer(2), every), SAME),
        ],
        context=torch.no_grad,
        checked=difference,
    )

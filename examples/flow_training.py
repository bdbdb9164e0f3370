"""Trains the examples' models as rectified flows.

Rectified flow (arXiv 2209.03003): x_t = (1 - sigma) x_0 + sigma noise, and the model learns the velocity noise - x_0.
Sigmas are logit-normal (arXiv 2403.03206); gates start at zero (adaLN-Zero, arXiv 2212.09748). What is kept is the
moving average of the weights, written in diffusers' own layout and in float16, which halves the file.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from lesa_kernels.files import replacing_all
from lesa_kernels.training.progress import progress_bar

LEARNING_RATE = 1.5e-3
WARMUP = 200
EMA_DECAY = 0.999

_Model = TypeVar("_Model", bound=nn.Module)


def zero_gates(model: nn.Module) -> None:
    """Zero all modulations and the last projection in place, so that each block starts as the identity (adaLN-Zero)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("norm" in name or name == "proj_out"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def learning_rate_factor(iteration: int, iterations: int) -> float:
    """Compute the factor on the learning rate: a linear warm-up, then a half cosine down to zero."""
    warmup = min(WARMUP, 1 + iterations // 10)
    if iteration < warmup:
        return (iteration + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (iteration - warmup) / max(1, iterations - warmup))


def flow_loss(velocity: Callable[[Tensor, Tensor], Tensor], clean: Tensor) -> Tensor:
    """Compute the mean squared error of the velocity at random times, with random numbers that no device changes.

    Args:
        velocity: (noisy images [B, ...], sigmas [B]) -> velocities [B, ...].
        clean: [B, ...], float32, images, on the model's device.

    Returns:
        loss: one element, float32, differentiable.
    """
    noise = torch.randn(clean.shape).to(clean.device)
    sigma = torch.randn(len(clean)).sigmoid().to(clean.device)
    mixed = torch.lerp(clean, noise, sigma.reshape(-1, *[1] * (clean.dim() - 1)))
    return nn.functional.mse_loss(velocity(mixed, sigma), noise - clean)


def train_flow(
    build: Callable[[], _Model], loss: Callable[[_Model], Tensor], iterations: int, seed: int, device: str
) -> _Model:
    """Train a model from scratch.

    Args:
        build: makes it with fresh weights, on the CPU.
        loss: draws a batch and computes its loss, one element, differentiable.
        iterations: number of updates.
        seed: seed of the weights and of what `loss` draws.
        device: where to train.

    Returns:
        The moving average of the weights, in evaluation mode.
    """
    torch.manual_seed(seed)
    model = build()
    zero_gates(model)
    nn.Module.to(model, device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, iterations))
    with progress_bar() as bar:
        task = bar.add_task("training", total=iterations)
        smooth = math.nan
        for iteration in range(iterations):
            error = loss(model)
            optimizer.zero_grad()
            error.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            update_average(average, model, iteration)
            smooth = error.item() if iteration == 0 else 0.99 * smooth + 0.01 * error.item()
            bar.update(task, advance=1, description=f"training, loss {smooth:.4f}")
    return average.eval()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, iteration: int) -> None:
    """Move the average of the weights towards the weights, in place."""
    # A fixed decay would keep a share of the untrained weights in a short run.
    decay = min(EMA_DECAY, (1 + iteration) / (10 + iteration))
    for kept, current in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(current, 1 - decay)


def save(model: ModelMixin, folder: Path) -> None:
    """Write a model as float16 safetensors with its config; each file appears complete or not at all.

    Args:
        model: the model, which stays as it is.
        folder: where to; made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_all(folder, "config.json") as unfinished:
        copy.deepcopy(model).half().save_pretrained(unfinished)

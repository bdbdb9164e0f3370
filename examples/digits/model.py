"""Makes and samples a small FLUX transformer that draws handwritten digits.

The model is diffusers' own `FluxTransformer2DModel`, only smaller. An image of 28x28 pixels, -1 (paper) to 1 (ink),
is 49 tokens of 4x4 pixels. The class stands where FLUX has its text, as a one-hot vector: one text token and the pooled
projection. Letters of the shapes: B batch, T = 49 image tokens, C = 16 numbers per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from examples.flow_models import load_trained

NUM_CLASSES = 10
TIME_SHIFT = 1.15
"""The `mu` of FLUX at 1024x1024: it moves the steps towards high noise."""

WEIGHTS = Path(__file__).parent / "weights"
"""The folder of the committed weights, in diffusers' own layout (`config.json` and a safetensors file)."""


@dataclass(frozen=True)
class Design:
    """The sizes of a small FLUX and of the square images that it draws.

    Attributes:
        image_size: pixels along an edge of the image.
        patch_size: pixels along an edge of a patch, which is one token.
        num_double: number of double blocks.
        num_single: number of single blocks.
        num_heads: number of attention heads.
        rope: sizes of the rotary embedding along the three axes; their sum is the size of a head.
    """

    image_size: int
    patch_size: int
    num_double: int
    num_single: int
    num_heads: int
    rope: tuple[int, int, int]

    @property
    def grid_size(self) -> int:
        """Patches along an edge of the image."""
        return self.image_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """Tokens T of an image."""
        return self.grid_size**2

    @property
    def token_size(self) -> int:
        """Pixels C of a token."""
        return self.patch_size**2


MNIST = Design(image_size=28, patch_size=4, num_double=2, num_single=4, num_heads=4, rope=(4, 14, 14))
SMALL_DIGITS = Design(image_size=8, patch_size=2, num_double=2, num_single=4, num_heads=3, rope=(4, 14, 14))
_DESIGNS = (MNIST, SMALL_DIGITS)
NUM_TOKENS = MNIST.num_tokens
TOKEN_SIZE = MNIST.token_size
IMAGE_SIZE = MNIST.image_size


def build_model(design: Design = MNIST) -> FluxTransformer2DModel:
    """Make the transformer with fresh weights; MNIST's has 2 double and 4 single blocks of width 128, 2.3 M parameters.

    Args:
        design: the sizes.

    Returns:
        The model in float32 on the CPU.
    """
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=design.token_size,
        num_layers=design.num_double,
        num_single_layers=design.num_single,
        attention_head_dim=sum(design.rope),
        num_attention_heads=design.num_heads,
        joint_attention_dim=NUM_CLASSES,
        pooled_projection_dim=NUM_CLASSES,
        guidance_embeds=False,
        axes_dims_rope=design.rope,
    )


def design_of(model: FluxTransformer2DModel) -> Design:
    """Return the design that a model was built from.

    Raises:
        ValueError: `model` has tokens of another size.
    """
    for design in _DESIGNS:
        if design.token_size == model.config.in_channels:
            return design
    sizes = [design.token_size for design in _DESIGNS]
    raise ValueError(f"design_of: model must have tokens of {sizes} numbers, got {model.config.in_channels}")


def load_model(
    device: str | torch.device = "cpu", folder: str | Path = WEIGHTS, dtype: torch.dtype = torch.float32
) -> FluxTransformer2DModel:
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
    return load_trained([partial(build_model, design) for design in _DESIGNS], folder, device, dtype)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Make FLUX's scheduler: Euler steps of a rectified flow, shifted in time; `set_up` readies it for a run."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def set_up(
    scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Put a scheduler before the first of `num_steps` steps, as the FLUX pipeline does.

    Args:
        scheduler: the scheduler, used or new.
        num_steps: number of steps S, at least 1.
        device: where the sigmas go.

    Returns:
        sigmas: [S + 1], float32, from 1 down to 0.

    Raises:
        ValueError: `num_steps` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"set_up: num_steps must be at least 1, got {num_steps}")
    unshifted = numpy.linspace(1.0, 1.0 / num_steps, num_steps)
    scheduler.set_timesteps(sigmas=unshifted, device=device, mu=TIME_SHIFT)
    scheduler.set_begin_index(0)
    sigmas: torch.Tensor = scheduler.sigmas
    return sigmas


def initial_noise(count: int, seed: int, device: str | torch.device = "cpu", *, design: Design = MNIST) -> torch.Tensor:
    """Draw the noise that `count` samples start from; the same numbers on every device.

    Args:
        count: number of samples B.
        seed: seed of the generator.
        device: where the noise goes.
        design: the sizes of the model.

    Returns:
        noise: [B, T, C], float32, standard normal tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, design.num_tokens, design.token_size, generator=generator).to(device)


def conditioning(
    labels: torch.Tensor, dtype: torch.dtype = torch.float32, *, design: Design = MNIST
) -> dict[str, torch.Tensor]:
    """Make the arguments of the transformer that stay the same through all steps.

    Args:
        labels: [B], int64, classes 0 to 9; their device is the device of all that is returned.
        dtype: floating point type of the model.
        design: the sizes of the model.

    Returns:
        Keyword arguments: `encoder_hidden_states` [B, 1, 10], `pooled_projections` [B, 10], `img_ids` [T, 3],
        `txt_ids` [1, 3].

    Raises:
        ValueError: `labels` does not have one dimension.
    """
    if labels.dim() != 1:
        raise ValueError(f"conditioning: labels must have one dimension, got shape {tuple(labels.shape)}")
    one_hot = torch.nn.functional.one_hot(labels, NUM_CLASSES).to(dtype)
    position = torch.arange(design.grid_size, device=labels.device, dtype=dtype)
    rows, columns = torch.meshgrid(position, position, indexing="ij")
    return {
        "encoder_hidden_states": one_hot[:, None],
        "pooled_projections": one_hot,
        "img_ids": torch.stack((torch.zeros_like(rows), rows, columns), dim=-1).reshape(design.num_tokens, 3),
        "txt_ids": torch.zeros(1, 3, device=labels.device, dtype=dtype),
    }


def patchify(images: torch.Tensor, design: Design = MNIST) -> torch.Tensor:
    """Cut images into tokens.

    Args:
        images: [B, image_size, image_size], any dtype.
        design: the sizes of the model.

    Returns:
        tokens: [B, T, C], patches row by row, pixels row by row within each.

    Raises:
        ValueError: `images` has another shape.
    """
    size, grid, patch = design.image_size, design.grid_size, design.patch_size
    if images.dim() != 3 or images.shape[1:] != (size, size):
        raise ValueError(f"patchify: images must have shape (B, {size}, {size}), got {tuple(images.shape)}")
    patches = images.reshape(-1, grid, patch, grid, patch)
    return patches.transpose(2, 3).reshape(-1, design.num_tokens, design.token_size)


def unpatchify(tokens: torch.Tensor, design: Design = MNIST) -> torch.Tensor:
    """Put tokens together to images; the inverse of `patchify`.

    Args:
        tokens: [B, T, C], any dtype.
        design: the sizes of the model.

    Returns:
        images: [B, image_size, image_size].

    Raises:
        ValueError: `tokens` has another shape.
    """
    expected = (design.num_tokens, design.token_size)
    if tokens.dim() != 3 or tokens.shape[1:] != expected:
        raise ValueError(
            f"unpatchify: tokens must have shape (B, {expected[0]}, {expected[1]}), got {tuple(tokens.shape)}"
        )
    grid, patch = design.grid_size, design.patch_size
    patches = tokens.reshape(-1, grid, grid, patch, patch)
    return patches.transpose(2, 3).reshape(-1, design.image_size, design.image_size)


@torch.no_grad()
def sample(
    model: FluxTransformer2DModel,
    noise: torch.Tensor,
    labels: torch.Tensor,
    num_steps: int = 50,
    *,
    scheduler: FlowMatchEulerDiscreteScheduler | None = None,
    progress: Callable[[int], object] | None = None,
) -> torch.Tensor:
    """Sample images, driving transformer and scheduler as the FLUX pipeline does.

    Args:
        model: the transformer, with or without hooks.
        noise: [B, T, C], dtype and device of the model, the tokens at sigma = 1.
        labels: [B], int64, classes 0 to 9, same device.
        num_steps: number of Euler steps S.
        scheduler: the scheduler to drive, for hooks that read its `sigmas` and `step_index`; a fresh one by default.
        progress: called after each step with the number of steps done.

    Returns:
        images: [B, image_size, image_size], dtype of the noise, about -1 (paper) to 1 (ink), not clamped.

    Raises:
        ValueError: there are not as many labels as noises.
    """
    if labels.shape != noise.shape[:1]:
        raise ValueError(
            f"sample: labels must have shape {tuple(noise.shape[:1])} like noise, got {tuple(labels.shape)}"
        )
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    set_up(scheduler, num_steps, noise.device)
    design = design_of(model)
    fixed = conditioning(labels, noise.dtype, design=design)
    tokens = noise
    for done, t in enumerate(scheduler.timesteps, start=1):
        timestep = t.expand(len(tokens)).to(tokens.dtype) / 1000
        with model.cache_context("cond"):
            velocity = model(hidden_states=tokens, timestep=timestep, **fixed, return_dict=False)[0]
        tokens = scheduler.step(velocity, t, tokens, return_dict=False)[0]
        if progress is not None:
            progress(done)
    return unpatchify(tokens, design)

"""Samples with fewer steps and no cache: by Euler, or by a two-step Adams-Bashforth solver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from examples.digits.model import conditioning, design_of, unpatchify
from examples.flow_models import integrate


def solve(
    model: FluxTransformer2DModel, noise: Tensor, labels: Tensor, sigmas: Sequence[float], order: Literal[1, 2]
) -> Tensor:
    """Sample images over given noise levels, one call of the model a step; see `integrate`.

    Args:
        model: the transformer.
        noise: [B, T, C], at sigmas[0].
        labels: [B], int64.
        sigmas: falling noise levels; the last one is where the samples end, 0.
        order: 1 is Euler, 2 Adams-Bashforth.

    Returns:
        images: [B, size, size].
    """
    design = design_of(model)
    fixed = conditioning(labels, noise.dtype, design=design)

    def velocity(tokens: Tensor, sigma: float) -> Tensor:
        timestep = torch.full((len(tokens),), sigma, dtype=tokens.dtype, device=tokens.device)
        output: Tensor = model(hidden_states=tokens, timestep=timestep, **fixed, return_dict=False)[0]
        return output

    return unpatchify(integrate(velocity, noise, sigmas, order), design)

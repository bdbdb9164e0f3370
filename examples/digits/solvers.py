"""Samples with fewer steps and no cache: by Euler, or by a two-step Adams-Bashforth solver."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from examples.digits.model import conditioning, design_of, unpatchify


@torch.no_grad()
def solve(
    model: FluxTransformer2DModel, noise: Tensor, labels: Tensor, sigmas: Sequence[float], order: Literal[1, 2]
) -> Tensor:
    """Integrate dx/dsigma = velocity(x, sigma) over given noise levels, one call of the model a step.

    Order 2 is Adams-Bashforth for unequal steps: x += h * ((1 + r/2) v - (r/2) v_previous), r the ratio of this step to
    the one before; its first step is Euler's.

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
    tokens, previous, before = noise, None, 0.0
    for now, after in itertools.pairwise(sigmas):
        timestep = torch.full((len(tokens),), now, dtype=tokens.dtype, device=tokens.device)
        velocity = model(hidden_states=tokens, timestep=timestep, **fixed, return_dict=False)[0]
        step = after - now
        slope = velocity
        if order == 2 and previous is not None:
            half_ratio = 0.5 * step / before
            slope = (1 + half_ratio) * velocity - half_ratio * previous
        tokens = tokens + step * slope
        previous, before = velocity, step
    return unpatchify(tokens, design)

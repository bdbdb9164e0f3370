"""The cases of the op that takes tokens whole: a forecast with its norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import (
    SIZES,
    copy_variant,
    dtype_name,
    half_rounded,
    implementations,
    random_features,
    wider,
)
from benchmarks.clock import Clock, Run
from benchmarks.harness import Case, Variant, sets_needed
from lesa_kernels import reference

INTO_AND_NORM = "lesa::forecast_into, then the model's norm"
MODELS_NORM = "the model's norm"
EPS = 1e-6
# Tokens at each end of an output that are checked.
CHECKED_TOKENS = 512


def models_norm(feature: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """What diffusers' `AdaLayerNormContinuous` does with a feature, operation by operation.

    Args:
        feature: [batch, tokens, channels].
        scale: [batch, channels].
        shift: [batch, channels].

    Returns:
        [batch, tokens, channels].
    """
    normed = functional.layer_norm(feature, feature.shape[-1:], eps=EPS)
    return normed * (1 + scale)[:, None, :] + shift[:, None, :]


def some_tokens(output: Tensor) -> Tensor:
    """Return the tokens [batch, at most 2 * CHECKED_TOKENS, channels] of an output that are checked."""
    if output.shape[1] <= 2 * CHECKED_TOKENS:
        return output
    return torch.cat([output[:, :CHECKED_TOKENS], output[:, -CHECKED_TOKENS:]], dim=1)


@torch.inference_mode()
def norm_case(size: str, clock: Clock, count: int = 8, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A forecast of K features and FLUX's final norm of it; one feature alone is not forecast but taken as it is."""
    shape, device = SIZES[size], clock.device
    moved = (count + 1) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    rings = [torch.stack(features) for features in random_features(shape, count + 1, dtype, sets, device)]
    scale, shift = (torch.randn(shape[0], shape[-1], device=device).to(dtype) for _ in range(2))
    coefficients = torch.randn(1, count, device=device) if count > 1 else torch.ones(1, 1, device=device)
    offsets, read = torch.zeros(1, device=device), list(range(count))

    def fused(ops: Any) -> Run:
        return lambda turn: [ops.forecast_norm(rings[turn % sets], coefficients, offsets, read, [], scale, shift, EPS)]

    def apart(turn: int) -> list[Tensor]:
        ring = rings[turn % sets]
        if count > 1:
            torch.ops.lesa.forecast_into(ring, coefficients, offsets, read, [count])
        return [models_norm(ring[-1 if count > 1 else 0], scale, shift)]

    ring = torch.stack([some_tokens(slot) for slot in rings[0][:count]]).to(wider(dtype))
    want = reference.forecast_norm(
        ring, coefficients, offsets, read, [], scale.to(ring.dtype), shift.to(ring.dtype), EPS
    )
    kernels = implementations(device).items()
    return Case(
        "forecast_norm",
        f"{size}, K={count}, {dtype_name(dtype)}",
        moved,
        [want],
        # Of a value's terms: its normed forecast times 1 + scale, and the shift.
        [(want - shift[:, None]).abs() + 1 + scale.abs().max() + shift.abs().max()],
        [
            *(Variant(f"{name}forecast_norm", fused(ops), half_rounded(dtype)) for name, ops in kernels),
            Variant(INTO_AND_NORM if count > 1 else MODELS_NORM, apart, half_rounded(dtype)),
            copy_variant(moved, sets, device),
        ],
        checked=some_tokens,
    )

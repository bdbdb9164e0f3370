"""The cases of ops that take tokens whole: a forecast with its norm, and histories in int8 or float8."""

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
    ends,
    half_rounded,
    implementations,
    random_features,
    wider,
)
from benchmarks.clock import Clock, Run
from benchmarks.harness import Case, Variant, sets_needed
from lesa_kernels import reference
from lesa_kernels.reference import TOLERANCES

INTO_AND_NORM = "lesa::forecast_into, then the model's norm"
MODELS_NORM = "the model's norm"
FROM_BFLOAT16 = "lesa::forecast_into of a history in bfloat16"
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


@torch.inference_mode()
def scaled_case(size: str, clock: Clock, dtype: torch.dtype, count: int = 8, rows: int = 1, keep: bool = False) -> Case:
    """Forecasts of K features kept in int8 or float8, into bfloat16, against the same of these features in bfloat16.

    Both histories hold the values that int8 or float8 left, so that no forecast may be off by more than roundings to
    bfloat16. With `keep` the forecasts are kept in the history as well.
    """
    shape, device = SIZES[size], clock.device
    elements = math.prod(shape)
    moved = elements * (count + rows * (2 + keep))
    sets = sets_needed(moved, clock.cache_bytes())
    plain = [torch.stack(features) for features in random_features(shape, count + rows, torch.bfloat16, sets, device)]
    rings = [torch.empty(ring.shape, dtype=dtype, device=device) for ring in plain]
    scales = [torch.empty(ring.shape[:-1], device=device) for ring in plain]
    for index, ring in enumerate(plain):
        for slot in range(count):
            torch.ops.lesa.push_scaled(rings[index], scales[index], ring[slot], slot)
            ring[slot].copy_(reference.unscaled(rings[index][slot], scales[index][slot]))
    coefficients, offsets = torch.randn(rows, count, device=device), torch.randn(rows, device=device)
    read, write = list(range(count)), list(range(count, count + rows))
    kept = write if keep else [-1] * rows
    out = torch.zeros(rows, *shape, dtype=torch.bfloat16, device=device)

    def scaled(ops: Any) -> Run:
        def run(turn: int) -> list[Tensor]:
            index = turn % sets
            ops.forecast_scaled_into(rings[index], scales[index], out, coefficients, offsets, read, kept)
            return list(out)

        return run

    def unscaled(turn: int) -> list[Tensor]:
        torch.ops.lesa.forecast_into(plain[turn % sets], coefficients, offsets, read, write)
        return list(plain[turn % sets][count:])

    history = [ends(reference.unscaled(rings[0][slot], scales[0][slot])) for slot in range(count)]
    kernels = implementations(device).items()
    return Case(
        "forecast_scaled_into",
        f"{size}, {dtype_name(dtype)}, K={count}, M={rows}{', kept' if keep else ''}",
        moved,
        reference.forecast(history, coefficients, offsets),
        reference.forecast([feature.abs() for feature in history], coefficients.abs(), offsets.abs()),
        [
            *(Variant(f"{name}forecast_scaled_into", scaled(ops), TOLERANCES[torch.bfloat16]) for name, ops in kernels),
            Variant(FROM_BFLOAT16, unscaled, half_rounded(torch.bfloat16)),
            copy_variant(moved, sets, device),
        ],
        checked=ends,
    )

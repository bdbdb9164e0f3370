"""The ops that take tokens (rows of channels) whole: check, launch a program for each token.

What each means stands in `lesa_kernels.reference`. Nothing is copied; what is allocated is the norm's result, and more
than 16 forecasts at once in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lesa_kernels import contract
from lesa_kernels.backends.triton.arguments import check_feature, codes_of, fresh_like, on_device_of, skew_of
from lesa_kernels.backends.triton.kernels import tokens as kernels
from lesa_kernels.backends.triton.passes import OPTIONS, ROWS, width_of

# A product that is fused with the sum that rounds it to an integer breaks ties otherwise than the reference does.
UNFUSED = {**OPTIONS, "enable_fp_fusion": False}
# Forecasts of one launch: a kernel of 64 of them, of 64 features, takes a quarter of an hour to compile.
MOST_FORECASTS = 16


def forecast_norm(
    ring: Tensor,
    coefficients: Tensor,
    offsets: Tensor,
    read: Sequence[int],
    write: Sequence[int],
    scale: Tensor,
    shift: Tensor,
    eps: float,
) -> Tensor:
    """`reference.forecast_norm`, of which only the result is allocated."""
    check_feature("forecast_norm", "ring", ring)
    contract.check_forecast_norm(ring, coefficients, offsets, read, write, scale, shift)
    if write:
        parameters = {"coefficients": coefficients, "offsets": offsets, "scale": scale, "shift": shift}
        contract.check_apart("forecast_norm", {"ring": ring}, parameters)
    out = fresh_like(ring[0])
    channels = ring.shape[-1]
    tokens = out.numel() // channels
    if tokens > 0:
        with on_device_of(ring):
            kernels.forecast_norm[(tokens,)](
                ring,
                codes_of(read),
                *(codes_of(write) or (None,)),
                out,
                coefficients,
                coefficients.stride(1),
                offsets,
                scale,
                *scale.stride(),
                shift,
                *shift.stride(),
                eps,
                tokens,
                tokens // ring.shape[1],
                channels,
                skew_of(channels, (ring, out)),
                len(read),
                ROWS,
                width_of(len(read), ring.element_size()),
                **OPTIONS,
            )
    return out


def _bits(ring: Tensor) -> Tensor:
    """Return a scaled ring as kernels take it: float8 as bits, whose conversions not all devices have."""
    return ring if ring.dtype == torch.int8 else ring.view(torch.uint8)


def push_scaled(ring: Tensor, scales: Tensor, feature: Tensor, slot: int) -> None:
    """`reference.push_scaled`, bit by bit."""
    contract.check_push_scaled(ring, scales, feature, slot)
    contract.check_apart("push_scaled", {"ring": ring, "scales": scales}, {"feature": feature})
    tokens, channels = scales[0].numel(), ring.shape[-1]
    if tokens > 0:
        with on_device_of(ring):
            kernels.push_scaled[(tokens,)](
                _bits(ring),
                scales,
                *codes_of([slot]),
                feature,
                tokens,
                channels,
                skew_of(channels, (ring, feature)),
                contract.SCALED_LIMITS[ring.dtype],
                ROWS,
                width_of(1, feature.element_size()),
                **UNFUSED,
            )


def forecast_scaled_into(
    ring: Tensor,
    scales: Tensor,
    out: Tensor,
    coefficients: Tensor,
    offsets: Tensor,
    read: Sequence[int],
    write: Sequence[int],
) -> None:
    """`reference.forecast_scaled_into`; allocates nothing for up to 16 forecasts, float32 copies of more."""
    contract.check_forecast_scaled_into(ring, scales, out, coefficients, offsets, read, write)
    contract.check_apart(
        "forecast_scaled_into",
        {"ring": ring, "scales": scales, "out": out},
        {"coefficients": coefficients, "offsets": offsets},
    )
    if len(write) <= MOST_FORECASTS:
        _forecast_scaled(ring, scales, out, coefficients, offsets, read, write)
        return
    # A slot may be read by every forecast: all are made before one is kept.
    made = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    for first in range(0, len(write), MOST_FORECASTS):
        some = slice(first, first + MOST_FORECASTS)
        _forecast_scaled(ring, scales, made[some], coefficients[some], offsets[some], read, [-1] * len(write[some]))
    for feature, slot in zip(made, write, strict=True):
        if slot >= 0:
            push_scaled(ring, scales, feature, slot)
    if made is not out:
        out.copy_(made)


def _forecast_scaled(
    ring: Tensor,
    scales: Tensor,
    out: Tensor,
    coefficients: Tensor,
    offsets: Tensor,
    read: Sequence[int],
    write: Sequence[int],
) -> None:
    """Launch `forecast_scaled_into` for a few forecasts."""
    tokens, channels = scales[0].numel(), ring.shape[-1]
    if tokens > 0:
        with on_device_of(ring):
            kernels.forecast_scaled_into[(tokens,)](
                _bits(ring),
                scales,
                codes_of(read),
                codes_of(write),
                out,
                coefficients,
                *coefficients.stride(),
                offsets,
                offsets.stride(0),
                tokens,
                channels,
                skew_of(channels, (ring, out)),
                contract.SCALED_LIMITS[ring.dtype],
                len(read),
                len(write),
                ROWS,
                width_of(len(read), out.element_size()),
                **UNFUSED,
            )

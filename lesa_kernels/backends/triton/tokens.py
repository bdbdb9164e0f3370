"""The op that takes tokens (rows of channels) whole: check, launch a program for each token.

What it means stands in `lesa_kernels.reference`. Nothing is copied, and only the result is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lesa_kernels import contract
from lesa_kernels.backends.triton.arguments import check_feature, codes_of, fresh_like, on_device_of, skew_of
from lesa_kernels.backends.triton.kernels import tokens as kernels
from lesa_kernels.backends.triton.passes import OPTIONS, ROWS, width_of


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

"""Checks of the op that takes whole tokens (rows of channels), for any set of kernels: `ops` has them by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cases import assert_close, contiguous, wide
from torch import Tensor

from lesa_kernels import reference
from lesa_kernels.reference import TOLERANCES

CHANNELS = [1, 7, 13, 64, 67, 131, 1030, 3072, 20000]


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors hold the same bits (NaN equals itself here)."""
    return got.shape == want.shape and torch.equal(
        got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)
    )


def check_norm(
    ops: Any,
    feature: tuple[int, ...],
    dtype: torch.dtype,
    count: int,
    write: Sequence[int] = (),
    modulation: tuple[Tensor, Tensor] | None = None,
    low: bool = False,
) -> None:
    """Check forecast_norm of `count` slots: its result, the slot that is kept, and that no other slot changes."""
    eps = 0.3
    ring = contiguous((max(count, 3) + 1, *feature), dtype)
    before, kind = ring.clone(), dtype if low or dtype == torch.float64 else torch.float32
    coefficients, offsets = contiguous((1, count), kind), contiguous((1,), kind)
    scale, shift = modulation or (contiguous((feature[0], feature[-1]), kind) for _ in range(2))
    read = [1, 0, *range(2, count)][:count]
    got = ops.forecast_norm(ring, coefficients, offsets, read, list(write), scale, shift, eps)
    assert got.dtype == dtype and got.shape == feature and got.is_contiguous()
    rows, parameters = wide([coefficients, offsets]), wide([scale, shift])
    want = reference.forecast_norm(before.double(), *rows, read, [], *parameters, eps)
    inputs = [before[slot].double() for slot in read]
    (plain,) = reference.forecast(inputs, *rows)
    (terms,) = reference.forecast([h.abs() for h in inputs], *(row.abs() for row in rows))
    # One rounding of the result, and before it float32's errors of the sums.
    errors = TOLERANCES[torch.float32].relative / TOLERANCES[dtype].relative if dtype.itemsize == 2 else 1.0
    assert_close(got, want, want.abs() + errors * _norm_terms(plain, terms, parameters[0], eps), dtype)
    for slot in range(ring.shape[0]):
        if slot in write:
            assert_close(ring[slot], plain, terms, dtype)
        else:
            assert torch.equal(ring[slot], before[slot])


def _norm_terms(plain: Tensor, terms: Tensor, scale: Tensor, eps: float) -> Tensor:
    """How errors of a forecast, in proportion to the sum of the magnitudes of its terms, show in its norm."""
    centered = plain - plain.mean(-1, keepdim=True)
    spread = (centered.square().mean(-1, keepdim=True) + eps).sqrt()
    gain = 1 + scale.view(plain.shape[0], *[1] * (plain.dim() - 2), plain.shape[-1])
    return (terms + terms.mean(-1, keepdim=True)) / spread * (1 + (centered / spread).abs()) * gain.abs()

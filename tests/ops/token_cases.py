"""Checks of the ops that take whole tokens (rows of channels), for any set of kernels: `ops` has them by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from cases import assert_close, contiguous, wide
from torch import Tensor

from lesa_kernels import reference
from lesa_kernels.reference import TOLERANCES

SCALED_DTYPES = [torch.int8, torch.float8_e4m3fn]
UNSCALED_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHANNELS = [1, 7, 13, 64, 67, 131, 1030, 3072, 20000]


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Whether two tensors hold the same bits (float8 has no comparison, and NaN equals itself here)."""
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


def check_push(ops: Any, feature: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Check push_scaled of a feature against the reference, bit by bit, and return the ring and its scales."""
    ring = torch.full((3, *feature.shape), 5, dtype=dtype)
    scales = torch.full(ring.shape[:-1], 7.0)
    ops.push_scaled(ring, scales, feature, 1)
    elements, row_scales = reference.scale_rows(feature.float(), dtype)
    assert same_bits(ring[1], elements)
    assert torch.equal(torch.isnan(scales[1]), torch.isnan(row_scales))
    assert torch.equal(scales[1].nan_to_num(-1), row_scales.nan_to_num(-1))
    assert bool((ring[::2].float() == 5).all()) and bool((scales[::2] == 7).all())
    return ring, scales


def scaled_ring(slots: int, feature: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random features of different sizes, kept in a ring of int8 or float8, and the scales of its rows."""
    sizes = torch.rand((slots, *feature[:-1], 1)) * 3
    return reference.scale_rows(torch.randn((slots, *feature)) * sizes, dtype)


def check_scaled_forecast(
    ops: Any,
    ring: Tensor,
    scales: Tensor,
    out_dtype: torch.dtype,
    read: Sequence[int],
    write: Sequence[int],
    low: bool = False,
) -> None:
    """Check forecast_scaled_into on random coefficients: `out`, the slots that are kept, and the others."""
    rows, kind = len(write), out_dtype if low else torch.float32
    coefficients, offsets = contiguous((rows, len(read)), kind), contiguous((rows,), kind)
    history = [reference.unscaled(ring[slot].clone(), scales[slot].clone()).double() for slot in read]
    want = reference.forecast(history, coefficients.double(), offsets.double())
    terms = reference.forecast([h.abs() for h in history], coefficients.double().abs(), offsets.double().abs())
    before = ring.clone(), scales.clone()
    out = torch.empty((rows, *ring.shape[1:]), dtype=out_dtype)
    ops.forecast_scaled_into(ring, scales, out, coefficients, offsets, list(read), list(write))
    for m in range(rows):
        assert_close(out[m], want[m], terms[m], out_dtype)
        if write[m] >= 0:
            assert_kept(ring[write[m]], scales[write[m]], want[m], terms[m])
    for slot in set(range(ring.shape[0])) - set(write):
        assert same_bits(ring[slot], before[0][slot]) and torch.equal(scales[slot], before[1][slot])


def assert_kept(elements: Tensor, scales: Tensor, want: Tensor, terms: Tensor) -> None:
    """Check a kept slot against the unrounded forecast: within half a step of the format around each element.

    Args:
        elements: [..., channels], int8 or float8_e4m3fn.
        scales: [...].
        want: [..., channels], float64.
        terms: [..., channels], float64, the sum of the magnitudes of the terms of `want`.
    """
    if want.numel() == 0:
        return
    limit = {torch.int8: 127, torch.float8_e4m3fn: 448}[elements.dtype]
    # float32's error of the sums moves an element, and by way of the largest one the scale of all.
    error = TOLERANCES[torch.float32].relative * (terms + terms.amax(-1, keepdim=True))
    assert bool(((scales * limit - want.abs().amax(-1)).abs() <= error.amax(-1)).all())
    steps = scales.double().unsqueeze(-1).expand(want.shape)
    if elements.dtype == torch.float8_e4m3fn:
        exponents = torch.frexp(elements.float().abs()).exponent.clamp(min=-5)  # 2^(e-1) <= |x| < 2^e, normal from 2^-6
        steps = steps * 2.0 ** (exponents - 4)
    excess = (reference.unscaled(elements, scales).double() - want).abs() - steps / 2 - error
    assert bool((excess <= 0).all()), f"off by {excess.max().item():.3e} beyond half a step of {elements.dtype}"

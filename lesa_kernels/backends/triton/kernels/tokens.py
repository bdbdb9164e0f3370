"""The kernel of the op that takes tokens (rows of channels) whole: a forecast with its norm.

A program takes one token, a tile of channels at a time, and walks it again for each thing that it has to know first:
the token stays in the caches. What is written last is the tile that the same threads have just read.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton's language is not Python's: mypy does not know its types, and it has no starred tuples.

from __future__ import annotations

import triton
import triton.language as tl

from lesa_kernels.backends.triton.kernels.combine import mixed, slot_of
from lesa_kernels.backends.triton.kernels.reduce import add, tile_of


@triton.jit
def forecast_tile(ring, codes, slot_stride, position, inside, coefficients, column_stride, offsets, K: tl.constexpr):
    """Return a tile of the forecast of K slots of a ring; `position` counts from the start of a slot."""
    held = ()
    for k in tl.static_range(K):
        source = slot_of(ring, codes[k], slot_stride)
        held = held + (tl.load(source + position, mask=inside, other=0.0).to(tl.float32),)
    return mixed(held, coefficients, column_stride, offsets, K)


@triton.jit(do_not_specialize=["tokens", "tokens_each", "skew"])
def forecast_norm(
    ring,
    read_codes,
    write_code,
    out,
    coefficients,
    column_stride,
    offsets,
    scale,
    scale_batch_stride,
    scale_stride,
    shift,
    shift_batch_stride,
    shift_stride,
    eps,
    tokens,
    tokens_each,
    channels,
    skew,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Forecast a token and normalize it: its mean first, then what is left without the mean.

    `tokens_each` of the tokens belong to each element of the batch. The plain forecast is kept where `write_code` is
    given.
    """
    token = tl.program_id(0).to(tl.int64)
    first = token * channels
    slot_stride = tokens.to(tl.int64) * channels
    tiles = (channels + ROWS * WIDTH - 1) // (ROWS * WIDTH)
    sums = tl.full((ROWS,), 0.0, tl.float32)
    for tile in range(tiles):
        channel = tile_of(tile, skew, ROWS, WIDTH)
        inside = channel < channels
        value = forecast_tile(
            ring, read_codes, slot_stride, first + channel, inside, coefficients, column_stride, offsets, K
        )
        sums += tl.reduce(tl.where(inside, value, 0.0), 1, add)
    mean = tl.reduce(sums, 0, add) / channels
    squares = tl.full((ROWS,), 0.0, tl.float32)
    for tile in range(tiles):
        channel = tile_of(tile, skew, ROWS, WIDTH)
        inside = channel < channels
        value = forecast_tile(
            ring, read_codes, slot_stride, first + channel, inside, coefficients, column_stride, offsets, K
        )
        centered = tl.where(inside, value - mean, 0.0)
        squares += tl.reduce(centered * centered, 1, add)
    factor = tl.rsqrt(tl.reduce(squares, 0, add) / channels + eps)
    batch = token // tokens_each
    for tile in range(tiles):
        channel = tile_of(tile, skew, ROWS, WIDTH)
        inside = channel < channels
        value = forecast_tile(
            ring, read_codes, slot_stride, first + channel, inside, coefficients, column_stride, offsets, K
        )
        gain = tl.load(scale + batch * scale_batch_stride + channel * scale_stride, mask=inside).to(tl.float32)
        offset = tl.load(shift + batch * shift_batch_stride + channel * shift_stride, mask=inside).to(tl.float32)
        normed = (value - mean) * factor * (1.0 + gain) + offset
        if write_code is not None:
            kept = slot_of(ring, write_code, slot_stride) + first + channel
            tl.store(kept, value.to(ring.dtype.element_ty), mask=inside)
        tl.store(out + first + channel, normed.to(out.dtype.element_ty), mask=inside)

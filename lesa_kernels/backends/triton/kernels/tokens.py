"""Kernels of the ops that take tokens (rows of channels) whole: a forecast with its norm, rings with a scale a token.

A program takes one token, a tile of channels at a time, and walks it again for each thing that it has to know first:
the token stays in the caches. What is written last is the tile that the same threads have just read.
"""
# mypy: ignore-errors
# ruff: noqa: RET505, RUF005
# Triton's language is not Python's: mypy does not know its types, and it has no starred tuples. Where a branch is
# chosen as it compiles, what follows a return is compiled too, what stands under `else` is not.

from __future__ import annotations

import triton
import triton.language as tl

from lesa_kernels.backends.triton.kernels.combine import mixed, slot_of
from lesa_kernels.backends.triton.kernels.reduce import add, tile_of

# Bits of float32: without the sign, of 2^-100 and of infinity. A row of smaller values counts as zero.
MAGNITUDE = tl.constexpr(0x7FFFFFFF)
SMALLEST = tl.constexpr(27 << 23)
INFINITY = tl.constexpr(0x7F800000)
NO_SLOT = tl.constexpr(3)  # the code of the slot -1


@triton.jit
def larger(a, b):
    """Return the larger of two numbers: what reductions combine with."""
    return tl.maximum(a, b)


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


@triton.jit
def widened(element):
    """Return int8, or the bits of float8_e4m3fn in uint8, as float32: `widen` in csrc/arithmetic.h."""
    if element.dtype == tl.int8:
        return element.to(tl.float32)
    else:
        bits = element.to(tl.uint32)
        magnitude = bits & 0x7F
        normal = tl.where(magnitude == 0x7F, 0x7FC00000, (magnitude << 20) + (120 << 23))
        subnormal = (magnitude.to(tl.float32) * 0.001953125).to(tl.uint32, bitcast=True)
        return (((bits & 0x80) << 24) | tl.where(magnitude < 8, subnormal, normal)).to(tl.float32, bitcast=True)


@triton.jit
def narrowed(value, element_ty: tl.constexpr):
    """Return float32 rounded to int8 or to the bits of float8_e4m3fn: `narrow` in csrc/arithmetic.h."""
    if element_ty == tl.int8:
        # Adding 1.5 * 2^23 leaves the integer, rounded, in the low bits of the sum.
        return ((value + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        magnitude = bits & MAGNITUDE
        # Normal from 2^-6 on; below, adding 2^14 leaves the multiple of 2^-9, rounded, in the low bits of the sum.
        normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
        subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        return (((bits >> 24) & 0x80) | tl.where(magnitude >= 0x3C800000, normal, subnormal)).to(tl.uint8)


@triton.jit
def magnitudes(value, inside):
    """Return for each row of a tile the largest magnitude, as bits: they compare like numbers, and NaN is the largest.

    A maximum of numbers may lose a NaN.
    """
    return tl.reduce(tl.where(inside, value.to(tl.int32, bitcast=True) & MAGNITUDE, 0), 1, larger)


@triton.jit
def row_scale(largest, LIMIT: tl.constexpr):
    """Return the scale of a row and its inverse, 0 where all elements are to be 0: `row_scale` in csrc/arithmetic.h.

    `largest` is the magnitude of the row's largest value, as bits.
    """
    value = largest.to(tl.float32, bitcast=True)
    usable = (largest >= SMALLEST) & (largest < INFINITY)
    # A number less itself is 0, infinity less itself NaN.
    scale = tl.where(usable, tl.div_rn(value, LIMIT), value - value)
    return scale, tl.where(usable, tl.div_rn(LIMIT, value), 0.0)


@triton.jit
def kept(value, inverse, element_ty: tl.constexpr):
    """Return the elements of a row, for kernels compiled without fusing: the product is rounded before `narrowed`."""
    # No product with 0: that of an infinity would be NaN.
    return narrowed(tl.where(inverse == 0.0, 0.0, value * inverse), element_ty)


@triton.jit(do_not_specialize=["tokens", "skew"])
def push_scaled(
    ring,
    scales,
    code,
    feature,
    tokens,
    channels,
    skew,
    LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Keep a token of a feature in a slot: its largest magnitude first, then its elements."""
    token = tl.program_id(0).to(tl.int64)
    first = token * channels
    tiles = (channels + ROWS * WIDTH - 1) // (ROWS * WIDTH)
    largest = tl.full((ROWS,), 0, tl.int32)
    for tile in range(tiles):
        channel = tile_of(tile, skew, ROWS, WIDTH)
        inside = channel < channels
        value = tl.load(feature + first + channel, mask=inside).to(tl.float32)
        largest = tl.maximum(largest, magnitudes(value, inside))
    scale, inverse = row_scale(tl.reduce(largest, 0, larger), LIMIT)
    target = slot_of(ring, code, tokens.to(tl.int64) * channels) + first
    for tile in range(tiles):
        channel = tile_of(tile, skew, ROWS, WIDTH)
        inside = channel < channels
        value = tl.load(feature + first + channel, mask=inside).to(tl.float32)
        tl.store(target + channel, kept(value, inverse, ring.dtype.element_ty), mask=inside)
    tl.store(slot_of(scales, code, tokens) + token, scale)


@triton.jit
def unscaled_tile(ring, scales, codes, token, tokens, channels, channel, inside, K: tl.constexpr):
    """Return a tile of a token in K slots of a scaled ring."""
    held = ()
    for k in tl.static_range(K):
        source = slot_of(ring, codes[k], tokens.to(tl.int64) * channels) + token * channels
        scale = tl.load(slot_of(scales, codes[k], tokens) + token)
        held = held + (widened(tl.load(source + channel, mask=inside, other=0)) * scale,)
    return held


@triton.jit(do_not_specialize=["tokens", "skew"])
def forecast_scaled_into(
    ring,
    scales,
    read_codes,
    write_codes,
    out,
    coefficients,
    row_stride,
    column_stride,
    offsets,
    offset_stride,
    tokens,
    channels,
    skew,
    LIMIT: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Forecast a token M times and keep what has a slot: into `out` first, for the scales of what is kept."""
    token = tl.program_id(0).to(tl.int64)
    slot_stride = tokens.to(tl.int64) * channels
    tiles = (channels + ROWS * WIDTH - 1) // (ROWS * WIDTH)
    largest = ()
    keeps = False
    for m in tl.static_range(M):
        largest = largest + (tl.full((ROWS,), 0, tl.int32),)
        keeps = keeps | (write_codes[m] != NO_SLOT)
    for tile in range(tiles):
        channel = tile_of(tile, skew, ROWS, WIDTH)
        inside = channel < channels
        held = unscaled_tile(ring, scales, read_codes, token, tokens, channels, channel, inside, K)
        found = ()
        for m in tl.static_range(M):
            value = mixed(held, coefficients + m * row_stride, column_stride, offsets + m * offset_stride, K)
            target = out + m * slot_stride + token * channels
            tl.store(target + channel, value.to(out.dtype.element_ty), mask=inside)
            found = found + (tl.maximum(largest[m], magnitudes(value, inside)),)
        largest = found
    row_scales = ()
    inverses = ()
    for m in tl.static_range(M):
        scale, inverse = row_scale(tl.reduce(largest[m], 0, larger), LIMIT)
        row_scales = row_scales + (scale,)
        inverses = inverses + (inverse,)
    for tile in range(tl.where(keeps, tiles, 0)):
        channel = tile_of(tile, skew, ROWS, WIDTH)
        inside = channel < channels
        held = unscaled_tile(ring, scales, read_codes, token, tokens, channels, channel, inside, K)
        for m in tl.static_range(M):
            value = mixed(held, coefficients + m * row_stride, column_stride, offsets + m * offset_stride, K)
            target = slot_of(ring, write_codes[m], slot_stride) + token * channels
            elements = kept(value, inverses[m], ring.dtype.element_ty)
            tl.store(target + channel, elements, mask=tl.where(write_codes[m] != NO_SLOT, inside, False))
    # All threads have read the scales: only then may one of them replace those.
    tl.debug_barrier()
    for m in tl.static_range(M):
        if write_codes[m] != NO_SLOT:
            tl.store(slot_of(scales, write_codes[m], tokens) + token, row_scales[m])

"""Kernels of `predict_backward` and `predict_l1`: all sums in one pass over the features, then an ordered finish.

S_k = sum g h_k, S_b = sum g, for a loss also sum |error|; g is the gradient of the forecast. Sums are float32: over a
thread's vector, over its tiles (few, see the launchers), over the program's threads, and over programs in `finish`,
always in the same order and without atomics.
"""
# mypy: ignore-errors
# ruff: noqa: RUF005
# Triton's language is not Python's: mypy does not know its types, and it has no starred tuples.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add(a, b):
    """Return a + b: what reductions combine with."""
    return a + b


@triton.jit
def tile_of(tile, skew, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the positions of a tile's elements [ROWS, WIDTH]: a thread takes a row, so that it adds up alone.

    `skew` is 0 or None, see `skew_of`.
    """
    rows = tl.arange(0, ROWS).to(tl.int64)[:, None] * WIDTH
    position = tile * (ROWS * WIDTH) + rows + tl.arange(0, WIDTH)[None, :]
    if skew is not None:
        position += skew
    return position


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr):
    """Return COUNT sums for each of ROWS threads."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.full((ROWS,), 0.0, tl.float32),)
    return sums


@triton.jit
def added(sums, slopes, held, K: tl.constexpr):
    """Return S_0 ... S_{K-1}, S_b with a tile's terms added."""
    total = ()
    for k in tl.static_range(K):
        total = total + (sums[k] + tl.reduce(slopes * held[k], 1, add),)
    return total + (sums[K] + tl.reduce(slopes, 1, add),)


@triton.jit
def write_partials(partials, sums, COUNT: tl.constexpr):
    """Write a program's sums into its column of `partials` [COUNT, programs]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    for i in tl.static_range(COUNT):
        tl.store(partials + i * programs + program, tl.reduce(sums[i], 0, add))


@triton.jit(do_not_specialize=["skew"])
def backward(
    grad,
    history,
    grad_history,
    partials,
    weight,
    weight_stride,
    gain,
    numel,
    skew,
    tiles,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Partial sums of `predict_backward` over `tiles` tiles a program; writes the history's gradients, if given."""
    scale = tl.load(gain).to(tl.float32)
    sums = zeros(K + 1, ROWS)
    first = tl.program_id(0).to(tl.int64) * tiles
    for tile in range(first, first + tiles):
        position = tile_of(tile, skew, ROWS, WIDTH)
        inside = position < numel
        slopes = tl.load(grad + position, mask=inside, other=0.0).to(tl.float32)
        held = ()
        for k in tl.static_range(K):
            held = held + (tl.load(history[k] + position, mask=inside, other=0.0).to(tl.float32),)
        sums = added(sums, slopes, held, K)
        if grad_history is not None:
            for k in tl.static_range(K):
                factor = scale * tl.load(weight + k * weight_stride).to(tl.float32)
                if k == K - 1:
                    factor += 1.0
                value = (slopes * factor).to(grad.dtype.element_ty)
                tl.store(grad_history[k] + position, value, mask=inside)
    write_partials(partials, sums, K + 1)


@triton.jit(do_not_specialize=["skew"])
def l1(
    history,
    target,
    out,
    partials,
    weight,
    weight_stride,
    bias,
    gain,
    numel,
    skew,
    tiles,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Partial sums of `predict_l1` over `tiles` tiles a program; writes the rounded forecast where `out` is given."""
    scale = tl.load(gain).to(tl.float32)
    shift = tl.load(bias).to(tl.float32)
    sums = zeros(K + 1, ROWS)
    loss = tl.full((ROWS,), 0.0, tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles
    for tile in range(first, first + tiles):
        position = tile_of(tile, skew, ROWS, WIDTH)
        inside = position < numel
        held = ()
        for k in tl.static_range(K):
            held = held + (tl.load(history[k] + position, mask=inside, other=0.0).to(tl.float32),)
        wanted = tl.load(target + position, mask=inside, other=0.0).to(tl.float32)
        mix = held[0] * tl.load(weight).to(tl.float32)
        for k in tl.static_range(1, K):
            mix += held[k] * tl.load(weight + k * weight_stride).to(tl.float32)
        forecast = held[K - 1] + scale * (mix + shift)
        if out is not None:
            tl.store(out + position, forecast.to(out.dtype.element_ty), mask=inside)
        error = tl.where(inside, forecast - wanted, 0.0)
        # The derivative of |error|: -1, 0 or 1, and NaN for NaN.
        slopes = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))
        sums = added(sums, slopes, held, K)
        loss += tl.reduce(tl.abs(error), 1, add)
    write_partials(partials, sums + (loss,), K + 2)


@triton.jit(do_not_specialize=["inputs"])
def finish(
    partials,
    programs,
    weight,
    weight_stride,
    bias,
    gain,
    loss,
    grad_weight,
    grad_bias,
    grad_gain,
    count,
    inputs,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add up `partials` in order and write the gradients, divided by `count`; the loss too where it is asked for.

    SUMS, a power of two, is no less than the rows of `partials`: one for each input, S_b, and the loss where there is.
    """
    row = tl.arange(0, SUMS)
    of_input = row < inputs
    rows = inputs + 1 if loss is None else inputs + 2
    sums = tl.full((SUMS, CHUNK), 0.0, tl.float32)
    for start in range(0, programs, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        here = (row[:, None] < rows) & (column < programs)
        sums += tl.load(partials + row[:, None] * programs + column, mask=here, other=0.0)
    totals = tl.reduce(sums, 1, add) / count
    total = tl.reduce(tl.where(row == inputs, totals, 0.0), 0, add)
    weights = tl.load(weight + row * weight_stride, mask=of_input, other=0.0).to(tl.float32)
    slope = tl.reduce(tl.where(of_input, weights * totals, 0.0), 0, add) + tl.load(bias).to(tl.float32) * total
    scale = tl.load(gain).to(tl.float32)
    tl.store(grad_weight + row, (scale * totals).to(grad_weight.dtype.element_ty), mask=of_input)
    tl.store(grad_bias, (scale * total).to(grad_bias.dtype.element_ty))
    tl.store(grad_gain, slope.to(grad_gain.dtype.element_ty))
    if loss is not None:
        tl.store(loss, tl.reduce(tl.where(row == inputs + 1, totals, 0.0), 0, add))

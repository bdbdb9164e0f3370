"""`gram`: all products of up to 16 features and the constant 1 in one pass, then a launch that writes the matrix.

More features are taken two groups of 8 at a time: 24 are read twice each, 64 seven times. Features that share one dense
layout are read as they lie in memory, others are first made contiguous.

Sums are float32 over a thread's vector, over its tiles and over the program's threads, float64 over programs, always in
the same order and without atomics; products that leave float32's range are summed again in float64. The sums stand as
an upper triangle, column by column; row and column 0 are the constant 1, feature k is k + 1.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005
# mypy does not know the types of Triton's language, which has no starred tuples.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.backends.triton.launch import OPTIONS, in_memory_order, launch, on_device_of, skew_of
from lesa_kernels.backends.triton.tiles import Pass, add, chosen, tile_of, write_partials, zeros

GROUP = 8
# Sums and features fill the registers: no more run at a time, and each has many sums to add up over its threads.
WARPS_PER_PROCESSOR = 16
# One warp adds up its threads' sums without shared memory: 153 sums compile in half the time.
WARPS = 1
MATRIX_CHUNK = 256
DOUBLE_CHUNK = 2048  # elements of a turn where a program sums products again in float64


@triton.jit
def added(sums, held, COUNT: tl.constexpr):
    """Return the sums with a tile's products added."""
    total = ()
    for column in tl.static_range(COUNT):
        for row in tl.static_range(column + 1):
            terms = held[row] * held[column]
            total = total + (sums[column * (column + 1) // 2 + row] + tl.reduce(terms, 1, add),)
    return total


@triton.jit(do_not_specialize=["skew"])
def products(features, partials, numel, skew, tiles, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Partial sums of `gram` over `tiles` tiles a program; the one that would be N counts masked elements too."""
    sums = zeros((K + 1) * (K + 2) // 2, ROWS)
    first = tl.program_id(0).to(tl.int64) * tiles
    for tile in range(first, first + tiles):
        position = tile_of(tile, skew, ROWS, WIDTH)
        held = (tl.full((ROWS, WIDTH), 1.0, tl.float32),)
        for k in tl.static_range(K):
            held = held + (tl.load(features[k] + position, mask=position < numel, other=0.0).to(tl.float32),)
        sums = added(sums, held, K + 1)
    write_partials(partials, sums, (K + 1) * (K + 2) // 2)


@triton.jit
def index_of(which, first, second, inputs, GROUP: tl.constexpr):
    """Return the row of the whole matrix for one of a pass: 0 is the constant, the last; the others are two groups."""
    index = tl.where(which <= GROUP, first + which - 1, second + which - 1 - GROUP)
    return tl.where(which == 0, inputs, index)


@triton.jit
def total_of(partials, programs, row, column, CHUNK: tl.constexpr):
    """Return the sum over programs of the products of two rows, row <= column."""
    sums = tl.full((CHUNK,), 0.0, tl.float64)
    for start in range(0, programs, CHUNK):
        program = start + tl.arange(0, CHUNK)
        source = partials + (column * (column + 1) // 2 + row).to(tl.int64) * programs + program
        sums += tl.load(source, mask=program < programs, other=0.0).to(tl.float64)
    return tl.reduce(sums, 0, add)


@triton.jit
def fits_float(squares):
    """Return whether float32 kept the products with a feature, judged by the sum of its squares (csrc/arithmetic.h)."""
    return (squares >= 2.0**-96) & (squares <= 2.0**127)


@triton.jit
def total_in_double(features, numel, row, column, K: tl.constexpr, WIDTH: tl.constexpr):
    """Return the sum of the products of two rows, from memory and in float64."""
    left, right = chosen(features, row - 1, K), chosen(features, column - 1, K)  # any for row 0, the constant
    sums = tl.full((WIDTH,), 0.0, tl.float64)
    for start in range(0, numel.to(tl.int64), WIDTH):
        position = start + tl.arange(0, WIDTH)
        factors = tl.load(left + position, mask=position < numel, other=0.0).to(tl.float32)
        terms = tl.load(right + position, mask=position < numel, other=0.0).to(tl.float32)
        sums += tl.where(row == 0, 1.0, factors).to(tl.float64) * terms.to(tl.float64)
    return tl.reduce(sums, 0, add)


@triton.jit(do_not_specialize=["first", "second", "inputs", "numel"])
def matrix(
    features,
    partials,
    programs,
    result,
    first,
    second,
    inputs,
    numel,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add up `partials` [places, programs] in order; a program writes one entry, those across the diagonal alike."""
    row, column = tl.program_id(0) // (K + 1), tl.program_id(0) % (K + 1)
    low, high = tl.minimum(row, column), tl.maximum(row, column)
    total = tl.where(high == 0, numel.to(tl.float64), total_of(partials, programs, low, high, CHUNK))
    if features[0].dtype.element_ty != tl.float16:  # whose products always fit
        fits = fits_float(total_of(partials, programs, high, high, CHUNK))
        fits &= (low == 0) | fits_float(total_of(partials, programs, low, low, CHUNK))
        if (high > 0) & (not fits):
            total = total_in_double(features, numel, low, high, K, WIDTH)
    place = index_of(row, first, second, inputs, GROUP) * (inputs + 1) + index_of(column, first, second, inputs, GROUP)
    tl.store(result + place, total)


def gram(features: Sequence[Tensor]) -> Tensor:
    """`reference.gram`; features that do not share a dense layout are copied."""
    inputs = len(features)
    flat = in_memory_order(features)
    result = features[0].new_empty((inputs + 1, inputs + 1), dtype=torch.float64)
    with on_device_of(flat[0]):
        for second in range(GROUP, max(inputs, GROUP + 1), GROUP):
            for first in range(0, second, GROUP):
                _write(result, flat, first, second)
    return result


def _write(result: Tensor, features: tuple[Tensor, ...], first: int, second: int) -> None:
    """Write the entries of the matrix for the features of two groups."""
    group = features[first : first + GROUP] + features[second : second + GROUP]
    count, numel = len(group), group[0].numel()
    skew = skew_of(numel, group)
    # Single elements of 16 features and all sums do not fit into registers several at a time.
    run = Pass(group[0], count, (count + 1) * (count + 2) // 2, WARPS_PER_PROCESSOR, WARPS, vectors=skew is None)
    run.launch("gram", products, group, run.partials, numel, skew)
    sums = (run.partials, run.programs, result, first, second, len(features), numel)
    constants = (count, GROUP, MATRIX_CHUNK, DOUBLE_CHUNK)
    launch("gram", matrix, (count + 1) ** 2, (group, *sums, *constants), OPTIONS)

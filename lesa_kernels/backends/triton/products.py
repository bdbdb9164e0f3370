"""`gram`: one pass over up to 16 features, then one small launch that writes the matrix.

More features are taken two groups of 8 at a time: 24 are read twice each, 64 seven times. Features that share one dense
layout are walked as they lie in memory, others are first made contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lesa_kernels.backends.triton.arguments import on_device_of, skew_of, walkable
from lesa_kernels.backends.triton.kernels import gram as kernels
from lesa_kernels.backends.triton.launch import launch
from lesa_kernels.backends.triton.passes import OPTIONS, Pass

GROUP = 8
# Sums and features fill the registers: no more run at a time, and each has many sums to add up over its threads.
WARPS_PER_PROCESSOR = 16
# One warp adds up its threads' sums without shared memory: 153 sums compile in half the time.
WARPS = 1
MATRIX_CHUNK = 256
DOUBLE_CHUNK = 2048  # elements of a turn where a program sums products again in float64


def gram(features: Sequence[Tensor]) -> Tensor:
    """`reference.gram`; features that do not share a dense layout are copied."""
    inputs = len(features)
    flat = walkable(features)
    result = features[0].new_empty((inputs + 1, inputs + 1), dtype=torch.float64)
    with on_device_of(flat[0]):
        for second in range(GROUP, max(inputs, GROUP + 1), GROUP):
            for first in range(0, second, GROUP):
                _write(result, flat, first, second)
    return result


def _write(result: Tensor, features: tuple[Tensor, ...], first: int, second: int) -> None:
    """Write the entries of the matrix for the features of two groups."""
    chosen = features[first : first + GROUP] + features[second : second + GROUP]
    count, numel = len(chosen), chosen[0].numel()
    skew = skew_of(numel, chosen)
    # Single elements of 16 features and all sums do not fit into registers several at a time.
    run = Pass(chosen[0], count, (count + 1) * (count + 2) // 2, WARPS_PER_PROCESSOR, WARPS, vectors=skew is None)
    run.launch("gram", kernels.products, chosen, run.partials, numel, skew)
    sums = (run.partials, run.programs, result, first, second, len(features), numel)
    constants = (count, GROUP, MATRIX_CHUNK, DOUBLE_CHUNK)
    launch("gram", kernels.matrix, (count + 1) ** 2, (chosen, *sums, *constants), OPTIONS)

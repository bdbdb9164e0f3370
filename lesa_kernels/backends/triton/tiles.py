"""Shared parts of kernels: positions in a feature, and passes in tiles whose programs have sums of their own.

The number of programs follows from N and the device, so that the same input gives the same bits. Of Triton, kernels use
builtins only: whether they are compiled or interpreted is then decided in this package alone.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005
# mypy does not know the types of Triton's language, which has no starred tuples.

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.backends.triton.launch import HELD_FLOATS, OPTIONS, WARPS, blocks_of, launch, power_of_2

VECTOR_BYTES = 16
# A float32 sum of one thread never has more terms than these tiles: 2^31 elements stay as exact as 2^20.
MOST_TILES = 64


@functools.cache
def _processors(device: torch.device) -> int:
    """Return the multiprocessors of a device; 1 for the CPU, where kernels are interpreted."""
    if device.type == "cpu":
        return 1
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["multiprocessor_count"])


def width_of(inputs: int, element_size: int) -> int:
    """Return how many elements next to each other a thread takes of each of its inputs."""
    return max(min(VECTOR_BYTES // element_size, HELD_FLOATS // power_of_2(inputs)), 1)


class Pass:
    """The shape of a pass over N elements of some features and where its programs leave their sums.

    Args:
        feature: one of the features, all of one layout.
        inputs: how many features a thread holds.
        sums: how many sums a program leaves in its column of `partials` [sums, programs].
        warps_per_processor: how many warps each multiprocessor gets, where there is enough to do.
        warps: the warps of a program, whose threads each take a row of a tile.
        vectors: whether a thread takes several elements next to each other, which pays where they are loaded as one.
    """

    def __init__(
        self,
        feature: Tensor,
        inputs: int,
        sums: int,
        warps_per_processor: int,
        warps: int = WARPS,
        vectors: bool = True,
    ) -> None:
        self.inputs = inputs
        self.width = width_of(inputs, feature.element_size()) if vectors else 1
        self.warps = warps
        tiles = blocks_of(feature.numel(), 32 * warps * self.width)
        most = _processors(feature.device) * warps_per_processor // warps
        self.tiles_each = min(blocks_of(tiles, most), MOST_TILES)
        self.programs = blocks_of(tiles, max(self.tiles_each, 1))
        self.partials = feature.new_empty((sums, self.programs), dtype=torch.float32)

    def launch(self, op: str, kernel: Any, *arguments: Any) -> None:
        """Launch a kernel for an op, if there is anything to add up."""
        if self.programs > 0:
            sizes = (self.tiles_each, self.inputs, 32 * self.warps, self.width)
            launch(op, kernel, self.programs, (*arguments, *sizes), {**OPTIONS, "num_warps": self.warps})


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
def write_partials(partials, sums, COUNT: tl.constexpr):
    """Write a program's sums into its column of `partials` [COUNT, programs]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    for i in tl.static_range(COUNT):
        tl.store(partials + i * programs + program, tl.reduce(sums[i], 0, add))


@triton.jit
def positions(numel, skew, BLOCK: tl.constexpr):
    """Return the positions of a program's elements and which of them exist; `skew` is 0 or None, see `skew_of`."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if skew is not None:
        position += skew
    return position, position < numel


@triton.jit
def chosen(values, which, COUNT: tl.constexpr):
    """Return one of a tuple's values by a number that only the running kernel knows; the first for no such number."""
    value = values[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(which == i, values[i], value)
    return value

"""A pass over features in tiles, each program with sums of its own: `predict_backward`, `predict_l1` and `gram`.

The number of programs follows from N and the device, so that the same input gives the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from lesa_kernels.backends.triton.arguments import blocks_of, power_of_2
from lesa_kernels.backends.triton.launch import launch

WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
VECTOR_BYTES = 16
HELD_FLOATS = 64
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

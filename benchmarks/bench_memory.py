"""Times the limits of memory: one large copy, and the pages that an allocator hands out fresh."""

from __future__ import annotations

import ctypes
import math
import mmap

import torch
from torch import Tensor

from benchmarks.cases import SIZES, copy_variant, dtype_name, ends
from benchmarks.clock import Clock
from benchmarks.harness import Case, Variant
from lesa_kernels.ops import Tolerance

HUGE_PAGE = 2**21
THERE, FRESH, HUGE = "fill_, memory that is there", "fill_, fresh memory", "fill_, fresh memory in huge pages"


def advised(output: Tensor) -> Tensor:
    """Ask for huge pages for the memory of a tensor, where the system has them, and return it."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        begin, end = output.data_ptr(), output.data_ptr() + output.nbytes
        first, last = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
        if last > first:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_HUGEPAGE)
    return output


def pages_case(size: str, clock: Clock, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Write an output of a size, which is all that these variants do, into memory of three kinds."""
    shape = SIZES[size]
    there = torch.zeros(shape, dtype=dtype)
    moved, exact = math.prod(shape) * dtype.itemsize, Tolerance(0.0, 0.0)
    one = ends(torch.ones(shape))
    return Case(
        "fresh pages",
        f"{size}, {dtype_name(dtype)}",
        moved,
        [one],
        [one],
        [
            Variant(THERE, lambda turn: [there.fill_(1)], exact),
            Variant(FRESH, lambda turn: [torch.empty_like(there).fill_(1)], exact),
            Variant(HUGE, lambda turn: [advised(torch.empty_like(there)).fill_(1)], exact),
            copy_variant(moved, 2, clock.device),
        ],
        checked=ends,
        sets=2,
    )


def ceiling_case(clock: Clock) -> Case:
    """One large copy: the bandwidth that this machine's memory gives, to which shares of data sheets are compared."""
    moved = 4 * 10**9 if clock.device.type == "cuda" else 2**28
    return Case("ceiling", f"copy of {moved / 1e9:.2g} GB", moved, [], [], [copy_variant(moved, 1, clock.device)])

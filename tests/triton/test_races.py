"""What the check for races in global memory finds, and what it passes."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton_engines import simulator


@triton.jit
def reverse(x, SIZE: tl.constexpr, BARRIER: tl.constexpr):
    """Reverse SIZE elements in place: all are read before they are written only where there is a barrier."""
    place = tl.arange(0, SIZE)
    value = tl.load(x + place)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + SIZE - 1 - place, value)


def _reverse(x: torch.Tensor, barrier: bool, blocks: int = 1) -> None:
    reverse[(blocks,)](x, x.numel(), barrier, num_warps=4, enable_fp_fusion=True)


def test_a_warp_that_writes_what_another_reads_is_found() -> None:
    with simulator():
        x = torch.arange(128.0)
        _reverse(x, True)
        assert torch.equal(x, torch.arange(128.0).flip(0))
        with pytest.raises(AssertionError, match="a warp writes what another one reads"):
            _reverse(x, False)


def test_a_block_that_writes_what_another_reads_is_found() -> None:
    with simulator(), pytest.raises(AssertionError, match="a block writes what another one reads"):
        _reverse(torch.arange(128.0), True, blocks=2)

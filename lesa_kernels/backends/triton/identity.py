"""`identity`: the least that an op of this package needs in Triton. A new op starts as a copy of this file."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from lesa_kernels.backends.triton.arguments import blocks_of, fresh_like, is_wide, on_device_of, skew_of
from lesa_kernels.backends.triton.launch import launch

WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
BYTES_IN_FLIGHT = 64  # of a thread: four loads of 16 bytes saturate memory


@triton.jit(do_not_specialize=["skew"])
def copy_feature(feature, out, numel, skew, BLOCK: tl.constexpr):
    """Copy BLOCK elements of a feature; `skew` is 0 or None, see `skew_of`."""
    position = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if skew is not None:
        position += skew
    inside = position < numel
    tl.store(out + position, tl.load(feature + position, mask=inside), mask=inside)


def identity(feature: Tensor) -> Tensor:
    """`reference.identity`; a feature that is not contiguous is copied by torch."""
    if not feature.is_contiguous():
        return feature.contiguous()
    out, numel = fresh_like(feature), feature.numel()
    if numel > 0:
        skew = skew_of(numel, (feature, out))
        key = ("identity", feature.device, feature.dtype, is_wide(numel)) if skew is None else None
        block = 32 * WARPS * BYTES_IN_FLIGHT // feature.element_size()
        with on_device_of(feature):
            launch("identity", copy_feature, blocks_of(numel, block), (feature, out, numel, skew, block), OPTIONS, key)
    return out

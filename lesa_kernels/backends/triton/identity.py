"""`identity`: the least that an op of this package needs in Triton. A new op starts as a copy of this file."""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
# mypy does not know the types of Triton's language.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.backends.triton.launch import (
    BYTES_IN_FLIGHT,
    OPTIONS,
    THREADS,
    blocks_of,
    is_wide,
    launch,
    on_device_of,
    skew_of,
)
from lesa_kernels.backends.triton.tiles import positions
from lesa_kernels.ops.register import fresh_like


@triton.jit(do_not_specialize=["skew"])
def copy_feature(feature, out, numel, skew, BLOCK: tl.constexpr):
    """Copy BLOCK elements of a feature; `skew` is 0 or None, see `skew_of`."""
    position, inside = positions(numel, skew, BLOCK)
    tl.store(out + position, tl.load(feature + position, mask=inside), mask=inside)


def identity(feature: Tensor) -> Tensor:
    """`reference.identity`; a feature that is not contiguous is copied by torch."""
    if not feature.is_contiguous():
        return feature.contiguous()
    out, numel = fresh_like(feature), feature.numel()
    if numel > 0:
        skew = skew_of(numel, (feature, out))
        key = ("identity", feature.device, feature.dtype, is_wide(numel)) if skew is None else None
        block = THREADS * BYTES_IN_FLIGHT // feature.element_size()
        with on_device_of(feature):
            launch("identity", copy_feature, blocks_of(numel, block), (feature, out, numel, skew, block), OPTIONS, key)
    return out

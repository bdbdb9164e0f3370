"""Times a copy of a feature: the least that a call of one of our ops costs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import SIZES, copy_variant, dtype_name, implementations, random_features
from benchmarks.clock import Clock, Run
from benchmarks.harness import Case, Variant, sets_needed
from lesa_kernels.ops import Tolerance


@torch.no_grad()
def identity_case(size: str, clock: Clock, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A fresh copy, against `Tensor.clone`."""
    shape, device = SIZES[size], clock.device
    moved = 2 * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    features = [row[0] for row in random_features(shape, 1, dtype, sets, device)]
    exact = Tolerance(0, 0)

    def of(copy: Callable[[Tensor], Tensor]) -> Run:
        return lambda turn: [copy(features[turn % sets])]

    variants = [
        *(Variant(f"{name}identity", of(ops.identity), exact) for name, ops in implementations(device).items()),
        Variant("Tensor.clone", of(torch.clone), exact),
        copy_variant(moved, sets, device),
    ]
    want = features[0].float()
    return Case("identity", f"{size}, {dtype_name(dtype)}", moved, [want], [want], variants, sets=sets)

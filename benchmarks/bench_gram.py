"""Times the sums of products that a least-squares fit needs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.baselines import (
    gram_by_dots,
    gram_by_matrix,
)
from benchmarks.cases import (
    FLOAT32_SUMS,
    SIZES,
    SUMS,
    copy_variant,
    dtype_name,
    implementations,
    random_features,
)
from benchmarks.clock import Clock, Run
from benchmarks.harness import Case, Variant, sets_needed
from lesa_kernels.ops import reference


@torch.no_grad()
def gram_case(size: str, clock: Clock, count: int = 9, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The sums of products that a closed-form fit needs, of a history and its target."""
    shape, device = SIZES[size], clock.device
    moved = count * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    features = random_features(shape, count, dtype, sets, device)

    def of(make: Callable[[list[Tensor]], Tensor]) -> Run:
        return lambda turn: [make(features[turn % sets])]

    variants = [
        *(Variant(f"{name}gram", of(ops.gram), SUMS) for name, ops in implementations(device).items()),
        Variant("torch: stack and a float64 product", of(gram_by_matrix), SUMS),
        Variant("torch: a dot product for each pair", of(gram_by_dots), FLOAT32_SUMS),
        copy_variant(moved, sets, device),
    ]
    return Case(
        "gram",
        f"{size}, K={count}, {dtype_name(dtype)}",
        moved,
        [reference.gram(features[0])],
        [reference.gram([feature.abs() for feature in features[0]])],
        variants,
        sets=sets,
    )

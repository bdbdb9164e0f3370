"""Defines the dtype of sums, weighted sums, and how exact a kernel must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """How far a kernel may lie from the float64 reference: |got - want| <= absolute + relative * scale."""

    relative: float
    absolute: float


# The scale is the sum of the magnitudes of the terms, so that cancellation is not held against a kernel. One rounding
# of the result costs half a unit in the last place (2^-9 bfloat16, 2^-12 float16); sums of 64 float32 terms cost a few
# 2^-24.
TOLERANCES: dict[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-14, 1e-14),
    torch.float32: Tolerance(4e-6, 1e-6),
    torch.float16: Tolerance(6e-4, 1e-6),
    torch.bfloat16: Tolerance(4.5e-3, 1e-6),
}


def arithmetic_dtype(features: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are kept in: float32, or float64 for float64 features."""
    return torch.float64 if features == torch.float64 else torch.float32


def weighted_sum(features: Sequence[Tensor], weights: Tensor, offset: Tensor) -> Tensor:
    """Return sum_k weights[k] * features[k] + offset, summed in order in the dtype of `weights`."""
    total = features[0].to(weights.dtype) * weights[0]
    for k in range(1, len(features)):
        total = total + features[k].to(weights.dtype) * weights[k]
    return total + offset

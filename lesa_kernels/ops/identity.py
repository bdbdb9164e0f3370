"""`identity`: the least that an op of this package needs. A new op starts as a copy of this file and of its tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lesa_kernels.ops.contract import check_feature
from lesa_kernels.ops.register import MakeTensor, Op, declare, fresh_like


def identity(feature: Tensor) -> Tensor:
    """Copy a feature.

    Args:
        feature: [*feature], any strides.

    Returns:
        A fresh contiguous tensor [*feature] of the same dtype.
    """
    return feature.clone(memory_format=torch.contiguous_format)


def _check(op: str, feature: Tensor) -> None:
    """Check the arguments."""
    check_feature(op, "feature", feature)


def _example(tensor: MakeTensor, shape: tuple[int, ...]) -> tuple[Tensor]:
    """Make valid arguments."""
    return (tensor(*shape),)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    """Return the gradient of the feature."""
    return grad


declare(Op("identity(Tensor feature) -> Tensor", identity, _check, _example, fresh_like, _backward))

"""`gram`: the sums of all products of features, which a least-squares fit needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lesa_kernels.ops.contract import check_features
from lesa_kernels.ops.register import MakeTensor, Op, declare


def gram(features: Sequence[Tensor]) -> Tensor:
    """Sums of the products of all pairs of K features and the constant 1.

    Args:
        features: K tensors [*feature], any strides; they have tangents, but no gradients.

    Returns:
        [K + 1, K + 1], float64, symmetric: entry (i, j) is the sum over the elements of h_i * h_j, where h_K = 1.
    """
    sums: dict[tuple[int, int], Tensor] = {}
    last = len(features)
    for i, feature in enumerate(features):
        wide = feature.double()
        for j in range(i + 1):
            sums[i, j] = sums[j, i] = (wide * features[j]).sum()
        sums[i, last] = sums[last, i] = wide.sum()
    sums[last, last] = torch.full_like(sums[0, 0], features[0].numel())
    return torch.stack([torch.stack([sums[i, j] for j in range(last + 1)]) for i in range(last + 1)])


def _check(op: str, features: Sequence[Tensor]) -> None:
    """Check the arguments."""
    check_features(op, "features", features)


def _fake(features: Sequence[Tensor]) -> Tensor:
    """Return a matrix that is not yet filled."""
    return features[0].new_empty((len(features) + 1, len(features) + 1), dtype=torch.float64)


def _example(tensor: MakeTensor, shape: tuple[int, ...]) -> tuple[list[Tensor]]:
    """Make valid arguments."""
    return ([tensor(*shape) for _ in range(4)],)


declare(Op("gram(Tensor[] features) -> Tensor", gram, _check, _example, _fake))

"""Damped Gauss-Newton (Levenberg-Marquardt) on a few coefficients, from sums that are collected run by run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_FIRST_DAMPING = 0.3
_MORE, _LESS = 10.0, 0.3
# Relative gains of the squared error below this are not worth another pass over the runs.
_WORTHWHILE = 1e-4
_GROUP = 32


def gram_of(columns: Sequence[Tensor]) -> Tensor:
    """Return the float64 Gram matrix [C, C] of any number of tensors, on the host."""
    count = len(columns)
    result = torch.zeros(count, count, dtype=torch.float64)
    groups = [range(start, min(start + _GROUP, count)) for start in range(0, count, _GROUP)]
    for number, rows in enumerate(groups):
        for others in groups[number:]:
            joint = list(rows) if others is rows else [*rows, *others]
            part = torch.ops.lesa.gram([columns[index] for index in joint])[:-1, :-1].cpu()
            result[torch.tensor(joint)[:, None], torch.tensor(joint)] = part
    return result


class DampedFit:
    """Minimises |r(c)|^2 by steps that are damped in the coefficients themselves, which keeps them near their start.

    One round: the residual at `candidate` and its derivatives are added up over all runs (`add`), then `close_round`
    keeps or drops the candidate and proposes the next.

    Args:
        start: C coefficients, float64.
        nearest: for a fit that cannot have all coefficients: takes some [C] and a metric [C, C], returns those that it
            can have, with the least distance to them in the metric; None for a fit that can have all.
        name: of what is fitted, for messages.
    """

    def __init__(
        self, start: Tensor, nearest: Callable[[Tensor, Tensor], Tensor] | None = None, name: str = "these steps"
    ) -> None:
        self.best = start.clone()
        self.candidate = start.clone()
        self.error = math.inf
        self.finished = False
        self._nearest = nearest
        self._name = name
        self._damping = _FIRST_DAMPING
        self._kept = torch.zeros(len(start) + 1, len(start) + 1, dtype=torch.float64)
        self._sums = torch.zeros_like(self._kept)
        self._scales: dict[int, Tensor] = {}

    @property
    def gram(self) -> Tensor:
        """The sums J'J of the best coefficients, [C, C]."""
        return self._kept[:-1, :-1]

    @property
    def damped_gram(self) -> Tensor:
        """The same, damped: positive definite, [C, C]."""
        size = self.gram.diagonal().mean().item() or 1.0
        return self.gram + self._damping * size * torch.eye(len(self.gram), dtype=torch.float64)

    def add(self, key: int, columns: Sequence[Tensor], residual: Tensor) -> None:
        """Add a batch of runs.

        Args:
            key: of the batch, the same in every round. The residuals of its first round set the scale of its samples:
                each counts alike, as in a mean of decibels.
            columns: C derivatives [B, ...] of the residual.
            residual: [B, ...].
        """
        if key not in self._scales:
            norms = residual.float().flatten(1).norm(dim=1).clamp_min(1e-20)
            self._scales[key] = norms.reciprocal().reshape(-1, *[1] * (residual.dim() - 1))
        scale = self._scales[key]
        self._sums += gram_of([(column.float() * scale).contiguous() for column in (*columns, residual)])

    def close_round(self) -> None:
        """Judge the candidate by what was added since the last round and propose another, or finish.

        Raises:
            FloatingPointError: when already the start gave residuals or derivatives that are not finite.
        """
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        error = sums[-1, -1].item() if sums.isfinite().all() else math.inf
        if math.isinf(error) and math.isinf(self.error):
            raise FloatingPointError(
                f"runs must stay finite where the fit of {self._name} starts: latents, outputs or slopes are not"
            )
        if error < self.error:
            if math.isfinite(self.error):
                self.finished = error > (1 - _WORTHWHILE) * self.error
                self._damping *= _LESS
            self.best, self.error, self._kept = self.candidate, error, sums
        else:
            self._damping *= _MORE
        normal, slope = self.gram, self._kept[:-1, -1]
        if not normal.diagonal().mean() > 0:
            self.finished = True
            return
        damped = self.damped_gram
        aim = self.best - torch.linalg.solve(damped, slope)
        self.candidate = aim if self._nearest is None else self._nearest(aim, damped)
        step = self.candidate - self.best
        # What the linear model promises; a direction that changes nothing promises nothing.
        promised = -(2 * slope @ step + step @ normal @ step)
        self.finished |= bool(promised < _WORTHWHILE * self.error)

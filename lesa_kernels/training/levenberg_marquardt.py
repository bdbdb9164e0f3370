"""Minimizes the sum of squares of residuals that come run by run, by Levenberg-Marquardt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MORE, _LESS, _LEAST_DAMPING = 10.0, 0.3, 1e-9
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


class LevenbergMarquardt:
    """Minimizes |r(c)|^2 by steps that are damped in the coefficients themselves, which keeps them near their start.

    One round: `add` sums up the residuals at `candidate` and their derivatives over all runs, then `close_round` keeps
    or drops the candidate and proposes the next one.

    Args:
        start: C coefficients, float64.
        name: what is fitted, for messages.
        damping: of the first step, relative to the mean of the diagonal of J'J.
        worthwhile: a relative gain of the squared error below this ends the search.
    """

    def __init__(
        self,
        start: Tensor,
        name: str = "these steps",
        *,
        damping: float = 0.3,
        worthwhile: float = 1e-4,
    ) -> None:
        self.best = start.clone()
        self.candidate = start.clone()
        self.error = math.inf
        self.finished = False
        self.rounds = 0
        self._name = name
        self._damping = damping
        self._worthwhile = worthwhile
        self._best_sums = torch.zeros(len(start) + 1, len(start) + 1, dtype=torch.float64)
        self._sums = torch.zeros_like(self._best_sums)
        self._scales: dict[int, Tensor] = {}
        self._first_error = math.inf

    @property
    def residual(self) -> float:
        """The size of the best residual, relative to that of the start; 1 before the first round."""
        return math.sqrt(self.error / self._first_error) if 0 < self._first_error < math.inf else 1.0

    @property
    def damped_gram(self) -> Tensor:
        """J'J of the best coefficients plus the damping: positive definite, [C, C]."""
        gram = self._best_sums[:-1, :-1]
        size = gram.diagonal().mean().item() or 1.0
        return gram + self._damping * size * torch.eye(len(gram), dtype=torch.float64)

    def add(self, key: int, columns: Sequence[Tensor], residual: Tensor) -> None:
        """Add a batch of runs.

        Args:
            key: of the batch, the same in every round. The residuals of its first round set the scale of its samples:
                each counts alike, as in a mean of ratios in dB.
            columns: C derivatives [B, ...] of the residual.
            residual: [B, ...].
        """
        if key not in self._scales:
            norms = residual.float().flatten(1).norm(dim=1).clamp_min(1e-20)
            self._scales[key] = norms.reciprocal().reshape(-1, *[1] * (residual.dim() - 1))
        scale = self._scales[key]
        self._sums += gram_of([(column.float() * scale).contiguous() for column in (*columns, residual)])

    def close_round(self) -> None:
        """Keep or drop the candidate by what was added since the last round; see `update`."""
        sums, self._sums = self._sums, torch.zeros_like(self._sums)
        self.update(sums)

    def update(self, sums: Tensor) -> None:
        """Keep or drop the candidate, and propose another one or finish.

        Args:
            sums: float64 [C+1, C+1], the Gram matrix of the derivatives and, last, the residual at the candidate.

        Raises:
            FloatingPointError: when already the start gave residuals or derivatives that are not finite.
        """
        error = sums[-1, -1].item() if sums.isfinite().all() else math.inf
        if math.isinf(error) and math.isinf(self.error):
            raise FloatingPointError(
                f"runs must stay finite where the fit of {self._name} starts: latents, outputs or slopes are not"
            )
        self.rounds += 1
        if self.rounds == 1:
            self._first_error = error
        if error < self.error:
            if math.isfinite(self.error):
                self.finished = error > (1 - self._worthwhile) * self.error
                self._damping = max(self._damping * _LESS, _LEAST_DAMPING)
            self.best, self.error, self._best_sums = self.candidate, error, sums
        else:
            self._damping *= _MORE
        gram, slope = self._best_sums[:-1, :-1], self._best_sums[:-1, -1]
        if not gram.diagonal().mean() > 0:
            self.finished = True
            return
        damped = self.damped_gram
        step = -torch.linalg.solve(damped, slope)
        self.candidate = self.best + step
        # What the linear model promises: |r|^2 - |r + J step|^2. A direction that changes nothing promises nothing.
        promised = -(2 * slope @ step + step @ gram @ step)
        self.finished |= bool(promised < self._worthwhile * self.error)

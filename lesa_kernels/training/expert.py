"""One segment in LESA's form: which combinations of full features its mixing weights and gains can make."""

from __future__ import annotations

import torch
from torch import Tensor

# A search from the best of many starts finds what one from a single start misses.
_SEARCHES, _ITERATIONS = 4, 60
_FIRST_DAMPING, _LEAST_DAMPING, _MOST_DAMPING = 1e-3, 1e-9, 1e8
_MORE, _LESS = 10.0, 0.3
_WORTHWHILE = 1e-6
# Keeps weights and gains small: features of neighboring steps are so alike that huge ones would fit as well, and would
# carry rounding and unseen noise into the images.
_RIDGE = 1e-4


class Expert:
    """Mixing weights and a gain for each forecast of a segment, in float64.

    Args:
        history: [K, J], the window's features before the first forecast as combinations of J full features.
        forecasts: N.
    """

    def __init__(self, history: Tensor, forecasts: int) -> None:
        self._history = history
        self._forecasts = forecasts
        # The newest feature again and again.
        self._found = history.new_zeros(len(history) + forecasts)
        self._found[len(history) - 1] = 1.0
        self._tried: list[tuple[Tensor, Tensor]] = []

    @property
    def weights(self) -> Tensor:
        """The mixing weights that were found last, or chosen, [K]."""
        return self._found[: len(self._history)]

    @property
    def gains(self) -> Tensor:
        """The gains likewise, [N]."""
        return self._found[len(self._history) :]

    def compose(self, weights: Tensor, gains: Tensor) -> Tensor:
        """Return the forecasts of weights [K] and gains [N] as combinations of full features, [N * J]."""
        known = list(self._history)
        for gain in gains:
            known.append(known[-1] + gain * (weights @ torch.stack(known[-len(weights) :])))
        return torch.stack(known[len(weights) :]).flatten()

    def nearest(self, target: Tensor, metric: Tensor) -> Tensor:
        """Find weights and gains.

        Args:
            target: coefficients [N * J] that are wanted.
            metric: positive definite [N * J, N * J]; distances are d' metric d.

        Returns:
            The nearest coefficients found, of weights and gains that are not large.
        """
        root = torch.linalg.cholesky(metric / metric.diagonal().mean()).T

        def distance(parameters: Tensor) -> float:
            return float(self._residual(parameters, target, root).square().sum())

        starts = sorted([self._found, *self._starts(target)], key=distance)[:_SEARCHES]
        self._found = min((self._descend(start, target, root) for start in starts), key=distance)
        made = self._compose(self._found)
        self._tried.append((made, self._found))
        return made

    def choose(self, coefficients: Tensor) -> None:
        """Take the weights and gains for which `nearest` returned these coefficients."""
        self._found = next(parameters for made, parameters in self._tried if torch.equal(made, coefficients))

    def _residual(self, parameters: Tensor, target: Tensor, root: Tensor) -> Tensor:
        return torch.cat([root @ (self._compose(parameters) - target), _RIDGE**0.5 * parameters])

    def _compose(self, parameters: Tensor) -> Tensor:
        return self.compose(parameters[: len(self._history)], parameters[len(self._history) :])

    def _starts(self, target: Tensor) -> list[Tensor]:
        """Return for each forecast the weights that point to it, with gains that come near the others in turn."""
        rows, starts = target.reshape(self._forecasts, -1), []
        for row in rows:
            change = (row - self._history[-1])[:, None]
            weights = torch.linalg.lstsq(self._history.T, change, driver="gelsd").solution[:, 0]
            known, gains = list(self._history), []
            for aim in rows:
                mixed = weights @ torch.stack(known[-len(weights) :])
                gains.append(mixed @ (aim - known[-1]) / (mixed @ mixed).clamp_min(1e-12))
                known.append(known[-1] + gains[-1] * mixed)
            starts.append(torch.cat([weights, torch.stack(gains)]))
        return starts

    def _descend(self, start: Tensor, target: Tensor, root: Tensor) -> Tensor:
        """Walk downhill by damped Gauss-Newton."""
        best, damping = start, _FIRST_DAMPING
        residual = self._residual(best, target, root)
        slopes = torch.func.jacrev(self._residual)(best, target, root)
        for _ in range(_ITERATIONS):
            normal = slopes.T @ slopes
            damped = normal + damping * normal.diagonal().mean() * torch.eye(len(normal), dtype=normal.dtype)
            tried = best - torch.linalg.solve(damped, slopes.T @ residual)
            left = self._residual(tried, target, root)
            if left.square().sum() < residual.square().sum():
                finished = left.square().sum() > (1 - _WORTHWHILE) * residual.square().sum()
                best, residual, damping = tried, left, max(damping * _LESS, _LEAST_DAMPING)
                if finished:
                    break
                slopes = torch.func.jacrev(self._residual)(best, target, root)
            else:
                damping *= _MORE
                if damping > _MOST_DAMPING:
                    break
        return best

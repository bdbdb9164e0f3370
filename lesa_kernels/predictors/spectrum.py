"""Forecasts from all full features at once by a regression on Chebyshev polynomials: Spectrum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lesa_kernels.checks import check_float, check_int
from lesa_kernels.ops.contract import MAX_HISTORY
from lesa_kernels.plan import Row, RowRule
from lesa_kernels.predictors.base import Predictor
from lesa_kernels.predictors.taylor import taylor_weights

# Powers beyond it say nothing that a run's few full features could.
_MAX_DEGREE = 16


class Spectrum(Predictor):
    """Spectrum (arXiv 2603.01623): ridge regression of all full features on Chebyshev polynomials of time.

    With tau the time on [-1, 1], X the rows (T_0(tau_k), ..., T_M(tau_k)) of the full steps before and D = I, a
    forecast is `(T_0(tau), ..., T_M(tau)) @ inv(X.T @ X + ridge * D) @ X.T` over the full features. The paper's own
    schedule is `Schedule.growing`.

    The ridge pulls at the constant too, so as published the coefficients of a row do not sum to 1 (0.65 to 0.96 at 10
    of 50 steps), and a feature that never changes is forecast too small. `free_constant` has D[0, 0] = 0: they do.

    The defaults are those of the authors' code (github.com/hanjq17/Spectrum) and of SGLang. They compute in bfloat16,
    keep 100 features and have tau run over 50 steps whatever the run's; here rows are float64, the last 64 full steps
    count and tau runs over the run's S steps. stable-diffusion.cpp takes the last 6 outputs instead of features, degree
    3 and ridge 1, and has 0.6 of the last output plus half the last difference in each forecast.

    Args:
        degree: M, 0 to 16.
        ridge: above 0.
        weight: of the regression, 0 to 1; the rest is the straight line through the last two full features. Published:
            1; the authors' README recommends 0.5 to 1.
        variable: what tau runs in: "step" as published, or "sigma".
        free_constant: leave the constant out of the ridge.

    Raises:
        ValueError: when a number is out of range or the variable is another.
        TypeError: when it is no number.
    """

    def __init__(
        self,
        degree: int = 4,
        ridge: float = 0.1,
        weight: float = 1.0,
        variable: Literal["step", "sigma"] = "step",
        free_constant: bool = False,
    ) -> None:
        self.degree = check_int("degree", degree, 0, _MAX_DEGREE)
        self.ridge = check_float("ridge", ridge, above=0)
        self.weight = check_float("weight", weight)
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight must be 0 to 1, got {weight!r}")
        if variable not in ("step", "sigma"):
            raise ValueError(f'variable must be "step" or "sigma", got {variable!r}')
        self.variable = variable
        self.free_constant = free_constant

    def rows(self, sigmas: Sequence[float]) -> RowRule:
        """See `Predictor.rows`."""
        times = [float(sigma) for sigma in sigmas] if self.variable == "sigma" else list(map(float, range(len(sigmas))))
        taus = [2 * (time - times[0]) / (times[-1] - times[0]) - 1 for time in times]

        def row(step: int, full_steps: Sequence[int]) -> Row:
            window = full_steps[-MAX_HISTORY:]
            weights = self._regression([taus[full] for full in window], taus[step])
            terms = dict(zip(window, (self.weight * weight for weight in weights), strict=True))
            line = window[-2:]
            for full, weight in zip(line, taylor_weights([times[full] for full in line], times[step]), strict=True):
                terms[full] += (1 - self.weight) * weight
            return Row(terms)

        return row

    def _regression(self, nodes: Sequence[float], position: float) -> list[float]:
        """Return the coefficients of the features at `nodes` in the regression's value at a position."""
        design = _chebyshev(nodes, self.degree)
        pull = torch.full((self.degree + 1,), self.ridge, dtype=torch.float64, device="cpu")
        pull[0] = 0.0 if self.free_constant else self.ridge
        normal = design.T @ design + pull.diag()
        weights: list[float] = (design @ torch.linalg.solve(normal, _chebyshev([position], self.degree)[0])).tolist()
        return weights

    def __repr__(self) -> str:
        return (
            f"Spectrum(degree={self.degree}, ridge={self.ridge}, weight={self.weight}, variable={self.variable!r}, "
            f"free_constant={self.free_constant})"
        )


def _chebyshev(taus: Sequence[float], degree: int) -> Tensor:
    """Return T_0 .. T_degree at each tau, [len(taus), degree + 1], float64."""
    angles = torch.tensor(taus, dtype=torch.float64, device="cpu").clamp(-1, 1).acos()
    return (angles[:, None] * torch.arange(degree + 1, dtype=torch.float64, device="cpu")).cos()

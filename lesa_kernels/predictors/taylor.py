"""Forecasts from full features without training: plain reuse, TaylorSeer and HiCache."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

from lesa_kernels.checks import check_float
from lesa_kernels.plan import Row, RowRule
from lesa_kernels.predictors.base import Predictor

MAX_ORDER = 3


class Reuse(Predictor):
    """Hands out the feature of the last full step again."""

    def rows(self, sigmas: Sequence[float]) -> RowRule:
        """See `Predictor.rows`; the sigmas do not matter."""
        return lambda step, full_steps: Row({full_steps[-1]: 1.0})


class TaylorSeer(Predictor):
    """TaylorSeer (arXiv 2503.06923): a Taylor polynomial around the last full step.

    Its derivatives are backward differences of the full features: the derivative of order i at a full step is the
    difference of those of order i-1 at this and the previous full step, divided by the distance of the two. With fewer
    full steps behind it than `order` + 1 it uses the orders that it has.

    Args:
        order: highest derivative, 0 to 3 (0 is reuse).
        variable: what the polynomial runs in: "sigma", or "step" as published.

    Raises:
        ValueError: for another order or variable.
    """

    def __init__(self, order: int = 2, variable: Literal["sigma", "step"] = "sigma") -> None:
        if isinstance(order, bool) or not isinstance(order, int) or not 0 <= order <= MAX_ORDER:
            raise ValueError(f"order must be 0 to {MAX_ORDER}, got {order!r}")
        if variable not in ("sigma", "step"):
            raise ValueError(f'variable must be "sigma" or "step", got {variable!r}')
        self.order = order
        self.variable = variable

    def rows(self, sigmas: Sequence[float]) -> RowRule:
        """See `Predictor.rows`."""
        positions = (
            [float(sigma) for sigma in sigmas] if self.variable == "sigma" else list(map(float, range(len(sigmas))))
        )

        def row(step: int, full_steps: Sequence[int]) -> Row:
            window = full_steps[-(self.order + 1) :]
            weights = taylor_weights([positions[full] for full in window], positions[step], self.basis)
            return Row(dict(zip(window, weights, strict=True)))

        return row

    def basis(self, order: int, distance: float) -> float:
        """Return what a derivative is multiplied with.

        Args:
            order: of the derivative.
            distance: from the last full step, in units of the variable.
        """
        return float(distance**order)

    def __repr__(self) -> str:
        return f"TaylorSeer(order={self.order}, variable={self.variable!r})"


class HiCache(TaylorSeer):
    """HiCache (arXiv 2508.16984): TaylorSeer's differences on contracted Hermite polynomials instead of powers.

    Where TaylorSeer has x^i, x the distance from the last full step, there stands c^i H_i(c x) with the physicists'
    Hermite polynomials H_i and a contraction c below 1.

    Args:
        order: highest derivative, 0 to 3.
        contraction: c, above 0; the authors' default is 0.5.
        variable: "step" as published, or "sigma".

    Raises:
        ValueError: for another order, variable or contraction.
    """

    def __init__(self, order: int = 2, contraction: float = 0.5, variable: Literal["sigma", "step"] = "step") -> None:
        super().__init__(order, variable)
        self.contraction = check_float("contraction", contraction, above=0)

    def basis(self, order: int, distance: float) -> float:
        """See `TaylorSeer.basis`."""
        x = self.contraction * distance
        value, before = 1.0, 0.0
        for degree in range(order):
            value, before = 2 * x * value - 2 * degree * before, value
        return self.contraction**order * value

    def __repr__(self) -> str:
        return f"HiCache(order={self.order}, contraction={self.contraction}, variable={self.variable!r})"


def taylor_weights(
    nodes: Sequence[float], position: float, basis: Callable[[int, float], float] = lambda order, x: x**order
) -> list[float]:
    """Coefficients of the features at `nodes` in the Taylor polynomial around the last of them.

    Args:
        nodes: positions of the full features, newest last; n of them give a polynomial of order n-1.
        position: where to evaluate it.
        basis: (order, distance from the last node) -> what the derivative of that order is multiplied with, before the
            division by its factorial.

    Returns:
        One coefficient a node; with powers as basis they sum to 1.

    Raises:
        ValueError: when two neighbouring nodes are the same.
    """
    count = len(nodes)
    if any(new == old for old, new in itertools.pairwise(nodes)):
        raise ValueError(f"the full steps must lie at different positions (sigmas), got {list(nodes)}")
    derivatives = [[float(i == j) for j in range(count)] for i in range(count)]
    weights = derivatives[-1][:]
    for order in range(1, count):
        # Node i now carries its derivative of this order; the first `order` nodes have none.
        derivatives = [
            [
                (new - old) / (nodes[i] - nodes[i - 1])
                for new, old in zip(derivatives[i], derivatives[i - 1], strict=True)
            ]
            if i >= order
            else derivatives[i]
            for i in range(count)
        ]
        factor = basis(order, position - nodes[-1]) / math.factorial(order)
        weights = [weight + factor * slope for weight, slope in zip(weights, derivatives[-1], strict=True)]
    return weights

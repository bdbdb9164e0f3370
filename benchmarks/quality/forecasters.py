"""Lists every forecaster that needs no training, those that only serve the comparison included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lesa_kernels.plan import Row, RowRule
from lesa_kernels.predictors import HiCache, Predictor, Reuse, Spectrum, TaylorSeer
from lesa_kernels.schedule import Schedule


class FoCa(Predictor):
    """FoCa (arXiv 2508.16211): the feature as an ODE's solution, by BDF2 and one correction by Heun's rule.

    From the features f_1 and f_2 of the last two steps, full or forecast, BDF2 with f_1 - f_2 as slope forecasts
    2 f_1 - f_2; Heun's rule then goes from f_1 by the mean of that forecast's slope and the slope between the last two
    full features. No code of the authors is public; cache-dit's calibrator does the same, but does not divide the
    latter slope by the distance of the two full steps.
    """

    def rows(self, sigmas: Sequence[float]) -> RowRule:
        """See `Predictor.rows`; steps are the time, the sigmas do not matter."""

        def row(step: int, full_steps: Sequence[int]) -> Row:
            last, before = step - 1, max(step - 2, full_steps[0])
            terms = dict.fromkeys({last, before, *full_steps[-2:]}, 0.0)
            terms[last] += 1.5
            terms[before] -= 0.5
            if len(full_steps) > 1:
                slope = 0.5 / (full_steps[-1] - full_steps[-2])
                terms[full_steps[-1]] += slope
                terms[full_steps[-2]] -= slope
            return Row(terms)

        return row


class Barycentric(Predictor):
    """Interpolation of the last full features in barycentric form, evaluated beyond them.

    The weights are those of Floater and Hormann (2007): a blend of the polynomials of some degree through each
    degree + 1 neighbours, a rational function without poles. With as many nodes as degree + 1 it is Lagrange's
    polynomial.

    Args:
        degree: of the polynomials.
        nodes: how many full features count.
    """

    def __init__(self, degree: int = 2, nodes: int = 3) -> None:
        self.degree = degree
        self.nodes = nodes

    def rows(self, sigmas: Sequence[float]) -> RowRule:
        """See `Predictor.rows`."""

        def row(step: int, full_steps: Sequence[int]) -> Row:
            window = full_steps[-self.nodes :]
            weights = barycentric_weights([sigmas[full] for full in window], self.degree, sigmas[step])
            return Row(dict(zip(window, weights, strict=True)))

        return row


def barycentric_weights(nodes: Sequence[float], degree: int, position: float) -> list[float]:
    """Coefficients of the features at `nodes` in Floater and Hormann's function at a position; they sum to 1."""
    degree = min(degree, len(nodes) - 1)
    weights = [0.0] * len(nodes)
    for first in range(len(nodes) - degree):
        group = range(first, first + degree + 1)
        for index in group:
            weight = (-1.0) ** first / (position - nodes[index])
            for other in group:
                weight /= 1.0 if other == index else nodes[index] - nodes[other]
            weights[index] += weight
    return [weight / sum(weights) for weight in weights]


class AdamsBashforth(Predictor):
    """Adams-Bashforth's rule on features, as if they were velocities.

    A forecast is the mean over [sigma_s+1, sigma_s] of the polynomial through the last full features, so that Euler's
    step by it is an Adams-Bashforth step. AB-Cache (arXiv 2504.10540) and PrediT (2602.18093) build on the rule; with
    2 and -1 for a whole segment AB-Cache has the first forecast of `Zeus`.

    Args:
        order: how many full features count.
    """

    def __init__(self, order: int = 2) -> None:
        self.order = order

    def rows(self, sigmas: Sequence[float]) -> RowRule:
        """See `Predictor.rows`."""

        def row(step: int, full_steps: Sequence[int]) -> Row:
            window = full_steps[-self.order :]
            nodes, middle = [sigmas[full] for full in window], (sigmas[step] + sigmas[step + 1]) / 2
            half = (sigmas[step] - sigmas[step + 1]) / 2
            # Gauss's two points integrate cubic polynomials exactly.
            means = [
                [weight / 2 for weight in barycentric_weights(nodes, len(nodes) - 1, middle + sign * half / 3**0.5)]
                for sign in (-1, 1)
            ]
            return Row(dict(zip(window, map(sum, zip(*means, strict=True)), strict=True)))

        return row


class Zeus(Predictor):
    """ZEUS's interleaving (arXiv 2604.01552): an extrapolation and the last output in turns.

    The first, third, ... forecast after a full step is 2 f_1 - f_2 from the last two full features, whatever their
    distance; the others are f_1. The authors skip two of three steps in the middle of a run, here the schedule is any.
    """

    def rows(self, sigmas: Sequence[float]) -> RowRule:
        """See `Predictor.rows`; the sigmas do not matter."""

        def row(step: int, full_steps: Sequence[int]) -> Row:
            if len(full_steps) > 1 and (step - full_steps[-1]) % 2 == 1:
                return Row({full_steps[-1]: 2.0, full_steps[-2]: -1.0})
            return Row({full_steps[-1]: 1.0})

        return row


TRAINING_FREE: dict[str, Predictor] = {
    "reuse": Reuse(),
    "TaylorSeer 1, sigma": TaylorSeer(1, "sigma"),
    "TaylorSeer 2, sigma": TaylorSeer(2, "sigma"),
    "TaylorSeer 3, sigma": TaylorSeer(3, "sigma"),
    "TaylorSeer 1, steps": TaylorSeer(1, "step"),
    "TaylorSeer 2, steps": TaylorSeer(2, "step"),
    "TaylorSeer 3, steps": TaylorSeer(3, "step"),
    "HiCache 2": HiCache(2),
    "Spectrum": Spectrum(),
    "Spectrum, weight 0.5": Spectrum(weight=0.5),
    "Spectrum, free constant": Spectrum(free_constant=True),
    "Spectrum, free constant, sigma": Spectrum(variable="sigma", free_constant=True),
    "FoCa": FoCa(),
    "barycentric 2": Barycentric(2, 3),
    "barycentric 3": Barycentric(3, 4),
    "Floater-Hormann 1": Barycentric(1, 4),
    "Adams-Bashforth on features 2": AdamsBashforth(2),
    "Adams-Bashforth on features 3": AdamsBashforth(3),
    "ZEUS": Zeus(),
}
"""Name -> forecaster; all serve any schedule."""


def spectrum_schedule(num_steps: int, calls: int) -> Schedule:
    """Return Spectrum's own schedule of so many calls: published but for the growth, the middle of those that fit.

    Args:
        num_steps: S.
        calls: full steps.

    Returns:
        The schedule: at 50 steps those published have growth 0.75, 14 calls, and 3, 10 calls.

    Raises:
        ValueError: when no growth gives so many.
    """
    schedules = [Schedule.growing(num_steps, growth=quarters / 4) for quarters in range(4 * num_steps)]
    fit = [schedule for schedule in schedules if len(schedule.full_steps) == calls]
    if not fit:
        raise ValueError(f"calls must be what some growth gives at {num_steps} steps, got {calls}")
    return fit[len(fit) // 2]


OWN_SCHEDULES: dict[str, Callable[[int, int], Schedule]] = {
    name: spectrum_schedule for name in TRAINING_FREE if name.startswith("Spectrum")
}
"""Name -> the rule of the forecaster's paper: (S, calls) -> schedule. The others are published with equal intervals."""

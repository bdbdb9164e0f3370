"""Fits LESA's own form through the model's tail: weights and gains of each segment, found in closed loop.

Composed over a segment, LESA's recursion is a combination of full features like any other, only that fewer of them can
be made. So the fit is that of `tail_fit`, but each of its steps ends at the nearest coefficients that LESA can make.
Weights and gains are found without touching a feature; the KAN is then set to give these gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lesa_kernels.checks import check_int, check_type
from lesa_kernels.predictors import LesaPredictor, LinearPredictor
from lesa_kernels.predictors.kan_network import GRID_RANGE, KAN, KANLinear
from lesa_kernels.schedule import Schedule
from lesa_kernels.training.levenberg_marquardt import LevenbergMarquardt, minimize
from lesa_kernels.training.progress import progress_bar
from lesa_kernels.training.tail_fit import (
    MOST_ROUNDS,
    WORTHWHILE,
    ClosedLoopRuns,
    Coefficients,
    FitSegment,
    assign,
    segments,
    vector,
)
from lesa_kernels.trajectories import TrajectorySource, check_source

# A search from the best of many starts finds what one from a single start misses.
_SEARCHES, _ITERATIONS = 4, 60
# Keeps weights and gains small: features of neighboring steps are so alike that huge ones would fit as well, and would
# carry rounding and unseen noise into the images.
_RIDGE = 1e-4
# Hidden units pass through these shares of half their splines' grid, so that no two bend alike.
_REACH = (0.2, 0.85)


@torch.no_grad()
def fit_lesa(
    source: TrajectorySource,
    fitted: LinearPredictor,
    *,
    window: int = 8,
    hidden_dim: int = 32,
    rounds: int | None = None,
    batch: int = 1,
    progress: bool = True,
) -> LesaPredictor:
    """Fit a predictor of LESA's form through the model's tail, with a stage for each segment.

    Goes from segment to segment in closed loop: each begins with what comes nearest to the fitted coefficients, near in
    what the tail notices of them. Biases are zero. The KANs begin with random weights: call `torch.manual_seed` before.

    Args:
        source: the runs that `fitted` was fitted to.
        fitted: what `fit` returned; its schedule and sigmas are taken over.
        window: most features that a stage reads, K.
        hidden_dim: width of the KANs.
        rounds: most passes over the runs for each segment, at least 2; None goes on until each has converged.
        batch: runs sampled as one batch.
        progress: show a bar, and how near each segment came.

    Returns:
        The predictor, float32 on the CPU.

    Raises:
        TypeError: when an argument is of another type.
        ValueError: when an argument is out of range, or `fitted` does not forecast all steps of its schedule; and as
            `fit` for the source.
        FloatingPointError: as `fit`.
    """
    check_source(source)
    check_type("fitted", fitted, LinearPredictor, "a LinearPredictor")
    # One to measure, one to try a change.
    most = MOST_ROUNDS if rounds is None else check_int("rounds", rounds, 2)
    sigmas, schedule = fitted.trained_sigmas, fitted.schedule
    predictor = LesaPredictor(len(sigmas) - 1, segment_stages(sigmas, schedule, window), hidden_dim)
    rule = fitted.rows(sigmas)
    with progress_bar(progress) as bar:
        runs = ClosedLoopRuns(source, schedule, batch, bar)
        if len(runs.branches) > 1:
            raise ValueError(
                f"source must run a model without guidance, LESA's form is fitted to one branch, got {runs.branches}"
            )
        coefficients: Coefficients = {}
        by_branch = dict.fromkeys(runs.branches, coefficients)
        for stage, segment in enumerate(runs.track("fitting LESA's form", most)):
            given = [full for full in schedule.full_steps if full <= segment.full_step]
            history = _history(coefficients, segment, given, predictor.stages[stage][1])
            for step in segment.steps:
                row = rule(step, given)
                if row is None:
                    raise ValueError(f"fitted must forecast all of {segment.name}, it has no coefficients for {step}")
                coefficients[step] = {full: row.terms.get(full, 0.0) for full in given}
            # The first pass measures what the tail notices of the coefficients: the metric of `nearest`.
            free = LevenbergMarquardt(vector(by_branch, segment), name=segment.name)
            runs.minimize(free, by_branch, segment, rounds=1)
            form = SegmentPredictor(history, len(segment.steps))
            start = form.nearest(free.best, free.damped_gram)
            search = LevenbergMarquardt(start, form.nearest, segment.name, worthwhile=WORTHWHILE)
            runs.minimize(search, by_branch, segment, most - 1)
            runs.report(search, segment, "the nearest form's", is_limited=rounds is not None)
            form.choose(search.best)
            mixer = cast(nn.Linear, predictor.latent[stage])
            mixer.weight.copy_(form.weights)
            mixer.bias.zero_()
            gains = set_gains(predictor, sigmas, stage, segment.steps, form.gains)
            assign(by_branch, segment, form.compose(mixer.weight.double().reshape(-1), gains))
    predictor.trained_sigmas = sigmas
    predictor.trained_schedule = schedule
    return predictor.eval()


def segment_stages(sigmas: Sequence[float], schedule: Schedule, window: int = 8) -> tuple[tuple[float, int], ...]:
    """Return (threshold, K) of a stage for every segment that has forecasts; all windows are filled.

    Args:
        sigmas: S+1 falling noise levels.
        schedule: which steps are full.
        window: most features that a stage reads, K.
    """
    window = check_int("window", window, 1)
    return tuple(
        (0.0 if segment.end == schedule.num_steps else sigmas[segment.end], min(window, segment.full_step + 1))
        for segment in segments(schedule)
    )


def _history(coefficients: Coefficients, segment: FitSegment, given: Sequence[int], window: int) -> Tensor:
    """Return the features before a segment's first forecast as combinations of the full ones, [K, J]."""
    before = range(segment.full_step - window + 1, segment.full_step + 1)
    known = [coefficients.get(step, {step: 1.0}) for step in before]
    return torch.tensor([[terms.get(full, 0.0) for full in given] for terms in known], dtype=torch.float64)


class SegmentPredictor:
    """LESA's forecasts of one segment: mixing weights, and a gain for each forecast, in float64.

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
        """The gains that were found last, or chosen, [N]."""
        return self._found[len(self._history) :]

    def compose(self, weights: Tensor, gains: Tensor) -> Tensor:
        """Return the forecasts of weights [K] and gains [N] as combinations of full features, [N * J]."""
        # forecast_n = newest + gain_n * sum_k w[k] * last K features
        known = list(self._history)
        for gain in gains:
            known.append(known[-1] + gain * (weights @ torch.stack(known[-len(weights) :])))
        return torch.stack(known[len(weights) :]).flatten()

    def nearest(self, target: Tensor, metric: Tensor) -> Tensor:
        """Find weights and gains that are not large and come near some coefficients.

        Args:
            target: coefficients [N * J] that are wanted.
            metric: positive definite [N * J, N * J]; distances are d' metric d.

        Returns:
            The nearest coefficients found.
        """
        root = torch.linalg.cholesky(metric / metric.diagonal().mean()).T

        def residual(parameters: Tensor) -> Tensor:
            return torch.cat([root @ (self._compose(parameters) - target), _RIDGE**0.5 * parameters])

        def distance(parameters: Tensor) -> float:
            return float(residual(parameters).square().sum())

        starts = sorted([self._found, *self._starts(target)], key=distance)[:_SEARCHES]
        self._found = min((minimize(residual, start, _ITERATIONS) for start in starts), key=distance)
        made = self._compose(self._found)
        self._tried.append((made, self._found))
        return made

    def choose(self, coefficients: Tensor) -> None:
        """Take the weights and gains for which `nearest` returned these coefficients."""
        self._found = next(parameters for made, parameters in self._tried if torch.equal(made, coefficients))

    def _compose(self, parameters: Tensor) -> Tensor:
        """Return the coefficients [N * J] of weights and gains in one vector."""
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
                # argmin over g of |aim - (newest + g * mixed)|^2
                gains.append(mixed @ (aim - known[-1]) / (mixed @ mixed).clamp_min(1e-12))
                known.append(known[-1] + gains[-1] * mixed)
            starts.append(torch.cat([weights, torch.stack(gains)]))
        return starts


@torch.no_grad()
def set_gains(
    predictor: LesaPredictor, sigmas: Sequence[float], stage: int, steps: Sequence[int], gains: Tensor
) -> Tensor:
    """Change a stage's KAN, in place, so that it gives wanted gains: its last layer is linear in its parameters.

    Args:
        predictor: float32.
        sigmas: S+1 noise levels.
        stage: whose KAN.
        steps: N steps.
        gains: [N], one for each.

    Returns:
        The gains that it gives in its own precision, float64 [N].
    """
    kan = cast(KAN, predictor.timestep[stage])
    levels = [sigmas[step] for step in steps]
    if len(steps) > 1:
        _spread(kan, (torch.tensor(levels, dtype=torch.float64)[:, None] - torch.tensor(sigmas, dtype=torch.float64)))
    last = cast(KANLinear, kan.layers[-1])
    linear = (last.base_weight, last.spline_weight)
    with torch.enable_grad():
        made = predictor.gain(sigmas, levels, stage).reshape(-1)
        slopes = [torch.autograd.grad(value, linear, retain_graph=True) for value in made]
    matrix = torch.stack([torch.cat([slope.flatten() for slope in row]) for row in slopes]).double()
    # The smallest change of the last layer with made + matrix @ change = gains.
    change = torch.linalg.lstsq(matrix, (gains - made.double())[:, None], driver="gelsd").solution[:, 0]
    for parameter, part in zip(linear, change.split([each.numel() for each in linear]), strict=True):
        parameter.add_(part.reshape(parameter.shape))
    return predictor.gain(sigmas, levels, stage).reshape(-1).double()


def _spread(kan: KAN, inputs: Tensor) -> None:
    """Shift and scale all hidden units so that over the inputs [N, I] each passes through its splines' grid.

    Neighboring noise levels would otherwise look alike to the last layer.
    """
    inputs = inputs.to(next(kan.parameters()))
    for each in list(kan.layers)[:-1]:
        layer = cast(KANLinear, each)
        made = layer(inputs)
        low, high = made.amin(0), made.amax(0)
        scale = 2 * GRID_RANGE[1] * torch.linspace(*_REACH, len(low)).to(low) / (high - low)
        layer.base_weight.mul_(scale[:, None])
        layer.spline_weight.mul_(scale[:, None, None])
        # The bases of a spline add up to one, so that equal weights make a constant.
        shift = -(low + high) / 2 * scale / layer.spline_scaler.square().sum(1)
        layer.spline_weight.add_((shift[:, None] * layer.spline_scaler)[:, :, None])
        inputs = layer(inputs)

"""Per-step coefficients in closed form: one pass over the features, then a linear system for each step.

At each forecast step the Gram matrix of all full features so far and the true feature is accumulated (`lesa::gram`).
Whatever linear form is wanted, its history is a combination of full features with known coefficients, so that these
matrices hold all there is to know: also the closed loop, in which forecasts are made from forecasts, is solved exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lesa_kernels.checks import check_float
from lesa_kernels.plan import Row
from lesa_kernels.predictors import LinearPredictor
from lesa_kernels.predictors.taylor import taylor_weights
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.training.policies import batches
from lesa_kernels.training.progress import progress_bar
from lesa_kernels.trajectories import ModelCall, TrajectorySource, check_source, watch

_PRIOR_ORDER = 2


def resolved(sigmas: Sequence[float], schedule: Schedule | ScheduleRule) -> Schedule:
    """Return a schedule for these sigmas.

    Raises:
        TypeError: when it is neither a schedule nor a rule that makes one.
        ValueError: when it is for another number of steps, or leaves nothing to forecast.
    """
    if not isinstance(schedule, Schedule) and not callable(schedule):
        raise TypeError(f"schedule must be a Schedule or a rule that makes one, got {type(schedule).__name__}")
    found = schedule if isinstance(schedule, Schedule) else schedule(sigmas)
    if not isinstance(found, Schedule):
        raise TypeError(f"schedule must make a Schedule from the sigmas, got {type(found).__name__}")
    if found.num_steps != len(sigmas) - 1:
        raise ValueError(f"schedule must have {len(sigmas) - 1} steps, got {found.num_steps}")
    if len(found.full_steps) == found.num_steps:
        raise ValueError("schedule must leave a step to forecast, got full steps only")
    return found


@dataclass
class GramStatistics:
    """What a linear fit needs to know of the features of unaccelerated runs. A policy.

    Args:
        schedule: which features are given.
        matrices: by branch and forecast step: float64 [J+2, J+2], the Gram matrix of the J full features so far, the
            true feature and the constant 1, summed over all runs.
    """

    schedule: Schedule
    matrices: dict[str, dict[int, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._full: dict[str, list[Tensor]] = {}

    def __call__(self, call: ModelCall) -> Tensor | None:
        """Answer a call in full and add its feature."""
        feature, output = watch(call)
        if call.step == 0:
            self._full[call.branch] = []
        history = self._full.get(call.branch, [])
        if len(history) != sum(full < call.step for full in self.schedule.full_steps):
            raise ValueError(f"source must call branch {call.branch!r} at every step, it came late to step {call.step}")
        if call.step in self.schedule.full_steps:
            history.append(feature)
            return output
        gram = torch.ops.lesa.gram([*history, feature])
        if not torch.isfinite(gram).all():
            raise FloatingPointError(f"features must be finite, they are not at step {call.step} ({call.branch})")
        steps = self.matrices.setdefault(call.branch, {})
        steps[call.step] = gram + steps[call.step] if call.step in steps else gram
        return output


@torch.no_grad()
def fit_features(
    source: TrajectorySource,
    schedule: Schedule | ScheduleRule,
    *,
    window: int = 3,
    over_all: bool = False,
    ridge: float = 1e-4,
    batch: int = 1,
    progress: bool = True,
) -> dict[str, LinearPredictor]:
    """Fit per-step coefficients to the true features by least squares.

    Args:
        source: unaccelerated runs; features suffice.
        schedule: where the full steps will lie.
        window: K.
        over_all: forecast from the last K steps, forecasts included, instead of from the last K full steps.
        ridge: pull towards Taylor's coefficients, relative to the mean square of each feature.
        batch: runs sampled as one batch.
        progress: show a bar.

    Returns:
        A predictor for each branch of the guidance.

    Raises:
        ValueError: when an argument is out of range or the source has no runs.
        FloatingPointError: when a feature is not finite; names the step.
    """
    check_source(source)
    ridge = check_float("ridge", ridge, least=0)
    placement = resolved(source.sigmas, schedule)
    statistics = GramStatistics(placement)
    with progress_bar(progress) as bar:
        for runs in bar.track(batches(source, batch), description="collecting Gram matrices"):
            source.run(runs, statistics)
    return {
        branch: solve(source.sigmas, placement, matrices, window, over_all, ridge)
        for branch, matrices in statistics.matrices.items()
    }


def solve(
    sigmas: Sequence[float],
    schedule: Schedule,
    matrices: dict[int, Tensor],
    window: int,
    over_all: bool,
    ridge: float,
) -> LinearPredictor:
    """Solve for the coefficients of every forecast step, in the order of the steps and in float64.

    Args:
        sigmas: S+1 noise levels.
        schedule: of the full steps.
        matrices: see `GramStatistics`.
        window: K.
        over_all: see `fit_features`.
        ridge: see `fit_features`.

    Returns:
        The predictor.
    """
    predictor = LinearPredictor(sigmas, schedule.full_steps, window, over_all)
    size = len(schedule.full_steps) + 1
    # Every feature as a combination of full features and, last, the constant 1.
    known = {full: torch.eye(size, dtype=torch.float64)[index] for index, full in enumerate(schedule.full_steps)}
    rows = {}
    for step, matrix in sorted(matrices.items()):
        gram = matrix.cpu()
        given = len(gram) - 2
        kept = [*range(given), len(gram) - 1]
        sources = predictor.sources(step)
        history = torch.stack([known[source][[*range(given), size - 1]] for source in sources])
        history = torch.cat([history, torch.eye(given + 1, dtype=torch.float64)[-1:]])
        normal = history @ gram[kept][:, kept] @ history.T
        wanted = history @ gram[kept, given]
        recent = sources[-_PRIOR_ORDER - 1 :]
        prior = torch.zeros(len(history), dtype=torch.float64)
        prior[len(sources) - len(recent) : -1] = torch.tensor(
            taylor_weights([sigmas[source] for source in recent], sigmas[step]), dtype=torch.float64
        )
        pull = ridge * torch.diag(normal.diagonal())
        found = torch.linalg.lstsq(normal + pull, wanted + pull @ prior, driver="gelsd").solution
        rows[step] = Row(dict(zip(sources, found[:-1].tolist(), strict=True)), found[-1].item())
        full = torch.zeros(size, dtype=torch.float64)
        full[[*range(given), size - 1]] = found @ history
        known[step] = full
    return LinearPredictor.from_rows(sigmas, schedule, rows, window, over_all)

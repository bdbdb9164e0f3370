"""Fits per-step coefficients by least squares on features, in plain torch: a baseline.

It minimizes the error of each feature, which is not what the images depend on: see docs/quality.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lesa_kernels.plan import Row
from lesa_kernels.predictors import LinearPredictor
from lesa_kernels.predictors.taylor import taylor_weights
from lesa_kernels.schedule import Schedule

_TAYLOR_ORDER = 2


@torch.no_grad()
def fit_features(
    features: Sequence[Tensor],
    sigmas: Sequence[float],
    schedule: Schedule,
    *,
    window: int,
    over_all: bool = False,
    ridge: float = 1e-4,
) -> LinearPredictor:
    """Fit coefficients to the features of unaccelerated runs, step by step; forecasts are made from forecasts.

    Args:
        features: S tensors of any one shape, those of all runs.
        sigmas: S+1 noise levels.
        schedule: its full steps.
        window: K.
        over_all: forecast from the last K steps, forecasts included, instead of from the last K full steps.
        ridge: pull towards Taylor's coefficients, relative to the mean square of each feature.

    Returns:
        The predictor.
    """
    predictor = LinearPredictor(sigmas, schedule.full_steps, window, over_all)
    known: list[Tensor] = []
    rows = {}
    for step, feature in enumerate(features):
        target = feature.double().flatten()
        if step in schedule.full_steps:
            known.append(target)
            continue
        sources = predictor.sources(step)
        columns = torch.stack([*(known[source] for source in sources), torch.ones_like(target)])
        recent = sources[-_TAYLOR_ORDER - 1 :]
        taylor = torch.zeros(len(columns), dtype=torch.float64)
        taylor[len(sources) - len(recent) : -1] = torch.tensor(
            taylor_weights([sigmas[source] for source in recent], sigmas[step]), dtype=torch.float64
        )
        normal = columns @ columns.T
        pull = ridge * torch.diag(normal.diagonal())
        found = torch.linalg.lstsq(normal + pull, columns @ target + pull @ taylor, driver="gelsd").solution
        rows[step] = Row(dict(zip(sources, found[:-1].tolist(), strict=True)), found[-1].item())
        known.append(found @ columns)
    return LinearPredictor.from_rows(sigmas, schedule, rows, window, over_all)

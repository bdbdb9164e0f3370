"""A KAN that gives wanted gains at some steps, found without descent: its last layer is linear in its parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lesa_kernels.predictors import LesaPredictor
from lesa_kernels.predictors.kan_network import GRID_RANGE, KAN, KANLinear

# Units pass through these shares of half their splines' grid, so that no two bend alike.
_REACH = (0.2, 0.85)


@torch.no_grad()
def set_gains(
    predictor: LesaPredictor, sigmas: Sequence[float], stage: int, steps: Sequence[int], gains: Tensor
) -> Tensor:
    """Move a stage's KAN, in place, to where it gives the gains of some steps.

    Args:
        predictor: float32.
        sigmas: S+1 noise levels.
        stage: whose KAN.
        steps: N steps.
        gains: [N], one for each.

    Returns:
        What it gives in its own precision, float64 [N].
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
    missing = (gains - made.double())[:, None]
    change = torch.linalg.lstsq(matrix, missing, driver="gelsd").solution[:, 0]
    for parameter, part in zip(linear, change.split([each.numel() for each in linear]), strict=True):
        parameter.add_(part.reshape(parameter.shape))
    return predictor.gain(sigmas, levels, stage).reshape(-1).double()


def _spread(kan: KAN, inputs: Tensor) -> None:
    """Shift and scale all hidden units so that over the inputs [N, I] each passes through its splines' grid.

    Neighbouring noise levels would otherwise look alike to the last layer.
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

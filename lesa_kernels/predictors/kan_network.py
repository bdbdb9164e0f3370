"""Computes LESA's gain by a Kolmogorov-Arnold network, in the published layout of parameters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

SPLINE_ORDER = 3
GRID_SIZE = 5
GRID_RANGE = (-3.0, 3.0)


class KANLinear(nn.Module):
    """One layer: base_weight @ silu(x) + (spline_weight * spline_scaler) @ B(x); see `torch.ops.lesa.kan_linear`.

    Args:
        inputs: I.
        outputs: O.
        grid_size: intervals of the uniform grid on [-3, 3].
        order: of the B-splines, 3 is cubic.
    """

    grid: Tensor

    def __init__(self, inputs: int, outputs: int, grid_size: int = GRID_SIZE, order: int = SPLINE_ORDER) -> None:
        super().__init__()
        low, high = GRID_RANGE
        spacing = (high - low) / grid_size
        knots = torch.arange(-order, grid_size + order + 1, dtype=torch.float32) * spacing + low
        self.register_buffer("grid", knots.expand(inputs, -1).contiguous())
        self.base_weight = nn.Parameter(torch.empty(outputs, inputs))
        self.spline_weight = nn.Parameter(torch.empty(outputs, inputs, grid_size + order))
        self.spline_scaler = nn.Parameter(torch.empty(outputs, inputs))
        self.reset_parameters()

    def reset_parameters(self, noise: float = 0.1) -> None:
        """Start from Kaiming-uniform base weights and splines of small noise.

        Args:
            noise: range of the spline coefficients, divided by the number of bases.
        """
        nn.init.kaiming_uniform_(self.base_weight, a=math.sqrt(5))
        nn.init.kaiming_uniform_(self.spline_scaler, a=math.sqrt(5))
        bound = 0.5 * noise / self.spline_weight.shape[2]
        nn.init.uniform_(self.spline_weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., I] to [..., O]."""
        result: Tensor = torch.ops.lesa.kan_linear(
            x, self.grid, self.base_weight, self.spline_weight, self.spline_scaler
        )
        return result


class KAN(nn.Module):
    """KAN layers in a row.

    Args:
        widths: inputs, hidden widths and outputs.
        grid_size: of each layer.
        order: of each layer's B-splines.
    """

    def __init__(self, widths: Sequence[int], grid_size: int = GRID_SIZE, order: int = SPLINE_ORDER) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            KANLinear(inputs, outputs, grid_size, order) for inputs, outputs in itertools.pairwise(widths)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., widths[0]] to [..., widths[-1]]."""
        for layer in self.layers:
            x = layer(x)
        return x

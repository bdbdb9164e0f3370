"""`kan_linear` and its backward: one launch forward, two backward (the inputs' gradient, the weights')."""

from __future__ import annotations

from torch import Tensor

from lesa_kernels.backends.triton.arguments import (
    blocks_of,
    contiguous,
    fresh_like,
    on_device_of,
    power_of_2,
)
from lesa_kernels.backends.triton.kernels import kan
from lesa_kernels.backends.triton.launch import launch
from lesa_kernels.ops.kan import spline_order

WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
# A layer of the predictor has few rows and 256 inputs and outputs: small blocks, so that one row fills a device.
FORWARD = (128, 2)  # inputs, outputs of a program's tile
BACKWARD_X = 256  # outputs
# Of the weights' gradient, a program is one warp whose threads have an input and these sums, outputs times bases.
BACKWARD_INPUTS = 32
BACKWARD_SUMS = 32


def kan_linear(x: Tensor, grid: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor) -> Tensor:
    """`reference.kan_linear`, of the order + 1 bases alone that are not zero; strided arguments are copied."""
    outputs, inputs = base_weight.shape
    knots, order = grid.shape[1], spline_order(grid, spline_weight)
    out = x.new_empty((*x.shape[:-1], outputs))
    if out.numel() > 0:
        block_in, block_out = min(power_of_2(inputs), FORWARD[0]), min(power_of_2(outputs), FORWARD[1])
        with on_device_of(x):
            tensors = (*contiguous([x, grid, base_weight, spline_weight, spline_scaler]), out)
            programs = out.numel() // outputs * blocks_of(outputs, block_out)
            arguments = (*tensors, inputs, outputs, knots, order, block_in, block_out)
            launch("kan_linear", kan.forward, programs, arguments, OPTIONS)
    return out


def kan_linear_backward(
    grad: Tensor, x: Tensor, grid: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.kan_linear_backward`; strided arguments are copied."""
    grad, x, grid, base, spline, scaler = contiguous([grad, x, grid, base_weight, spline_weight, spline_scaler])
    gradients = fresh_like(x), fresh_like(base_weight), fresh_like(spline_weight), fresh_like(spline_scaler)
    with on_device_of(x):
        _backward_x(grad, x, grid, base, spline, scaler, gradients[0])
        _backward_weights(grad, x, grid, spline, scaler, *gradients[1:])
    return gradients


def _backward_x(
    grad: Tensor, x: Tensor, grid: Tensor, base: Tensor, spline: Tensor, scaler: Tensor, grad_x: Tensor
) -> None:
    outputs, inputs = base.shape
    if grad_x.numel() == 0:
        return
    order, block = spline_order(grid, spline), min(power_of_2(outputs), BACKWARD_X)
    arguments = (grad, x, grid, base, spline, scaler, grad_x, inputs, outputs, grid.shape[1], order, block)
    launch("kan_linear_backward", kan.backward_x, x.numel(), arguments, OPTIONS)


def _backward_weights(
    grad: Tensor,
    x: Tensor,
    grid: Tensor,
    spline: Tensor,
    scaler: Tensor,
    grad_base: Tensor,
    grad_spline: Tensor,
    grad_scaler: Tensor,
) -> None:
    outputs, inputs = scaler.shape
    if grad_base.numel() == 0:
        return
    block_out = min(outputs, max(BACKWARD_SUMS // spline.shape[2], 1))
    programs = blocks_of(outputs, block_out) * blocks_of(inputs, BACKWARD_INPUTS)
    tensors = (grad, x, grid, spline, scaler, grad_base, grad_spline, grad_scaler)
    layer = (x.numel() // inputs, inputs, outputs, grid.shape[1], spline_order(grid, spline))
    arguments = (*tensors, *layer, BACKWARD_INPUTS, block_out)
    launch("kan_linear_backward", kan.backward_weights, programs, arguments, {**OPTIONS, "num_warps": 1})

"""`kan_linear` and its backward: one layer of a KAN, whose edges are B-splines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lesa_kernels.ops.contract import check_device, check_feature, check_parameter, name_of, shape_of
from lesa_kernels.ops.numerics import arithmetic_dtype
from lesa_kernels.ops.register import MakeTensor, Op, declare, fresh_like, refuse_second_derivative, save_arguments


def spline_order(grid: Tensor, spline_weight: Tensor) -> int:
    """Return the order of the B-splines of a KAN layer (3 is cubic): knots = bases + order + 1.

    Args:
        grid: [in, knots].
        spline_weight: [out, in, bases].
    """
    return grid.shape[1] - spline_weight.shape[2] - 1


def spline_bases(x: Tensor, grid: Tensor, order: int) -> Tensor:
    """B-spline bases by the Cox-de Boor recursion on half-open intervals; the grid may be non-uniform.

    Args:
        x: [..., I].
        grid: [I, G], ascending knots of each input.
        order: polynomial order, 3 is cubic.

    Returns:
        [..., I, G - 1 - order]; zero outside the knots, at infinity too. NaN where x is and the order is above 0.
    """
    x = x.unsqueeze(-1)
    # Every basis is zero beyond the knots as it is at the last one; further out, products would be inf * 0.
    x = torch.where((x < grid[:, :1]) | (x > grid[:, -1:]), grid[:, -1:], x)
    bases = ((x >= grid[:, :-1]) & (x < grid[:, 1:])).to(x.dtype)
    for degree in range(1, order + 1):
        rising = (x - grid[:, : -degree - 1]) / (grid[:, degree:-1] - grid[:, : -degree - 1])
        falling = (grid[:, degree + 1 :] - x) / (grid[:, degree + 1 :] - grid[:, 1:-degree])
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    return bases


def spline_slopes(x: Tensor, grid: Tensor, order: int) -> Tensor:
    """Derivative of `spline_bases` in x: the difference of two bases of one order less.

    Args:
        x: [..., I].
        grid: [I, G].
        order: polynomial order of the bases.

    Returns:
        [..., I, G - 1 - order].
    """
    if order == 0:
        return torch.zeros_like(spline_bases(x, grid, 0))
    lower = spline_bases(x, grid, order - 1)
    scaled = lower * (order / (grid[:, order:] - grid[:, :-order]))
    return scaled[..., :-1] - scaled[..., 1:]


def kan_linear(x: Tensor, grid: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor) -> Tensor:
    """One KAN layer: base_weight @ silu(x) + (spline_weight * spline_scaler) @ B(x), B the B-spline bases.

    Args:
        x: [..., I].
        grid: [I, B + order + 1], ascending knots, not differentiated.
        base_weight: [O, I], float32 or x's dtype.
        spline_weight: [O, I, B], likewise.
        spline_scaler: [O, I], likewise.

    Returns:
        [..., O] of x's dtype, contiguous.
    """
    dtype = arithmetic_dtype(x.dtype)
    wide, knots = x.to(dtype), grid.to(dtype)
    bases = spline_bases(wide, knots, spline_order(grid, spline_weight))
    splines = spline_weight.to(dtype) * spline_scaler.to(dtype).unsqueeze(-1)
    # The products would enter the dispatcher again and be cast to the autocast dtype.
    with torch.autocast(x.device.type, enabled=False):
        smooth = functional.linear(functional.silu(wide), base_weight.to(dtype))
        return (smooth + functional.linear(bases.flatten(-2), splines.flatten(1))).to(x.dtype).contiguous()


def kan_linear_backward(
    grad: Tensor, x: Tensor, grid: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `kan_linear` in x, base_weight, spline_weight and spline_scaler.

    Args:
        grad: [..., O], x's dtype.
        x: [..., I].
        grid: [I, B + order + 1].
        base_weight: [O, I].
        spline_weight: [O, I, B].
        spline_scaler: [O, I].

    Returns:
        The four gradients, each in the dtype and shape of what it belongs to.
    """
    dtype = arithmetic_dtype(x.dtype)
    rows, knots, order = x.shape[:-1].numel(), grid.to(dtype), spline_order(grid, spline_weight)
    wide, g = x.to(dtype).reshape(rows, x.shape[-1]), grad.to(dtype).reshape(rows, base_weight.shape[0])
    base, spline, scaler = (parameter.to(dtype) for parameter in (base_weight, spline_weight, spline_scaler))
    sigmoid = torch.sigmoid(wide)
    silu_slope = sigmoid * (1 + wide * (1 - sigmoid))
    with torch.autocast(x.device.type, enabled=False):
        through_splines = (g @ (spline * scaler.unsqueeze(-1)).flatten(1)).reshape(rows, *spline.shape[1:])
        grad_x = (g @ base) * silu_slope + (through_splines * spline_slopes(wide, knots, order)).sum(-1)
        grad_base = g.T @ (wide * sigmoid)
        grad_scaled = (g.T @ spline_bases(wide, knots, order).flatten(1)).reshape(spline.shape)
    return (
        grad_x.reshape(x.shape).to(x.dtype),
        grad_base.to(base_weight.dtype),
        (grad_scaled * scaler.unsqueeze(-1)).to(spline_weight.dtype),
        (grad_scaled * spline).sum(-1).to(spline_scaler.dtype),
    )


def _check(op: str, x: Tensor, grid: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor) -> None:
    """Check a layer of I inputs, O outputs and B bases."""
    check_feature(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"lesa::{op}: x must have shape (..., inputs), got {shape_of(x)}")
    inputs = x.shape[-1]
    if base_weight.dim() != 2 or base_weight.shape[1] != inputs:
        raise ValueError(f"lesa::{op}: base_weight must have shape (outputs, {inputs}), got {shape_of(base_weight)}")
    outputs = base_weight.shape[0]
    if spline_weight.dim() != 3 or tuple(spline_weight.shape[:2]) != (outputs, inputs) or spline_weight.shape[2] < 1:
        raise ValueError(
            f"lesa::{op}: spline_weight must have shape ({outputs}, {inputs}, bases), got {shape_of(spline_weight)}"
        )
    bases = spline_weight.shape[2]
    if grid.dim() != 2 or grid.shape[0] != inputs or grid.shape[1] < bases + 1:
        raise ValueError(f"lesa::{op}: grid must have shape ({inputs}, {bases} + order + 1), got {shape_of(grid)}")
    check_parameter(op, "grid", grid, (inputs, grid.shape[1]), "x", x)
    check_parameter(op, "base_weight", base_weight, (outputs, inputs), "x", x)
    check_parameter(op, "spline_weight", spline_weight, (outputs, inputs, bases), "x", x)
    check_parameter(op, "spline_scaler", spline_scaler, (outputs, inputs), "x", x)


def _check_backward(op: str, grad: Tensor, x: Tensor, grid: Tensor, base_weight: Tensor, *splines: Tensor) -> None:
    """Check a layer and the gradient of its outputs."""
    _check(op, x, grid, base_weight, *splines)
    shape = (*x.shape[:-1], base_weight.shape[0])
    if tuple(grad.shape) != shape:
        raise ValueError(f"lesa::{op}: grad must have shape {shape}, got {shape_of(grad)}")
    if grad.dtype != x.dtype:
        raise TypeError(f"lesa::{op}: grad must have dtype {name_of(x.dtype)} like x, got {name_of(grad.dtype)}")
    check_device(op, "grad", grad, "x", x)


def _fake(x: Tensor, grid: Tensor, base_weight: Tensor, spline_weight: Tensor, spline_scaler: Tensor) -> Tensor:
    """Return the outputs."""
    return x.new_empty((*x.shape[:-1], base_weight.shape[0]))


def _fake_backward(grad: Tensor, x: Tensor, grid: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients."""
    return fresh_like(x), *map(fresh_like, weights)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients; None for the grid."""
    grad_x, *grad_weights = torch.ops.lesa.kan_linear_backward(grad, *ctx.saved_tensors)
    return grad_x, None, *grad_weights


def _example(tensor: MakeTensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Make valid arguments: a layer of 3 inputs and 2 outputs."""
    x = tensor(4, 3)
    grid = torch.linspace(-6.6, 6.6, 12).to(x.dtype).expand(3, 12).contiguous()
    return x, grid, tensor(2, 3), tensor(2, 3, 8), tensor(2, 3)


def _example_backward(tensor: MakeTensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Make valid arguments."""
    return tensor(4, 2), *_example(tensor, shape)


declare(
    Op(
        "kan_linear(Tensor x, Tensor grid, Tensor base_weight, Tensor spline_weight, Tensor spline_scaler) -> Tensor",
        kan_linear,
        _check,
        _example,
        _fake,
        _backward,
        save_arguments,
    )
)
declare(
    Op(
        "kan_linear_backward(Tensor grad, Tensor x, Tensor grid, Tensor base_weight, Tensor spline_weight,"
        " Tensor spline_scaler) -> (Tensor, Tensor, Tensor, Tensor)",
        kan_linear_backward,
        _check_backward,
        _example_backward,
        _fake_backward,
        refuse_second_derivative,
    )
)

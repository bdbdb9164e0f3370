"""`kan_linear` and its backward: one launch forward, two backward (the inputs' gradient, the weights').

At any x only order + 1 B-splines are not zero: those of the knot span that x lies in. An edge is a pair of input i and
output o: base[o, i] * silu(x) + scaler[o, i] * sum_b spline[o, i, b] * B_b(x). All tensors of a kernel are contiguous:
x [rows, I], grid [I, KNOTS], base and scaler [O, I], spline [O, I, BASES].
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005
# mypy does not know the types of Triton's language, which has no starred tuples.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.backends.triton.launch import OPTIONS, blocks_of, contiguous, launch, on_device_of, power_of_2
from lesa_kernels.backends.triton.tiles import add, zeros
from lesa_kernels.ops.kan import spline_order
from lesa_kernels.ops.register import fresh_like

# A layer of the predictor has few rows and 256 inputs and outputs: small blocks, so that one row fills a device.
FORWARD = (128, 2)  # inputs, outputs of a program's tile
BACKWARD_X = 256  # outputs
# Of the weights' gradient, a program is one warp whose threads have an input and these sums, outputs times bases.
BACKWARD_INPUTS = 32
BACKWARD_SUMS = 32


@triton.jit
def last_knot(x, grid, i, KNOTS: tl.constexpr):
    """Return the index of the last knot that is not above x, compared as in the definition; -1 where there is none."""
    count = tl.full(x.shape, 0, tl.int32)
    for k in tl.static_range(KNOTS):
        knot = tl.load(grid + i * KNOTS + k).to(tl.float32)
        count += (x >= knot).to(tl.int32)
    return count - 1


@triton.jit
def knot_at(grid, i, index, KNOTS: tl.constexpr):
    """Return a knot of each input; indices that do not exist are clipped, what they lead to is dropped in the end."""
    index = tl.where(index < 0, 0, tl.where(index >= KNOTS, KNOTS - 1, index))
    return tl.load(grid + i * KNOTS + index).to(tl.float32)


@triton.jit
def local_splines(x, grid, i, KNOTS: tl.constexpr, ORDER: tl.constexpr, SLOPES: tl.constexpr):
    """Return the number of the first basis at x and the values (or slopes) of it and the next ORDER.

    Cox-de Boor from the one basis of order 0 that is not zero. Of degree d, basis `span - d + r` (r = 0 ... d) is made
    of shares: those of degree d - 1 divided by the width of their support. A slope is a difference of shares.
    """
    span = last_knot(x, grid, i, KNOTS)
    values = (tl.full(x.shape, 1.0, tl.float32),)
    shares = ()
    for degree in tl.static_range(1, ORDER + 1):
        raised = ()
        shares = ()
        carried = tl.full(x.shape, 0.0, tl.float32)
        for r in tl.static_range(degree):
            left = knot_at(grid, i, span + 1 - degree + r, KNOTS)
            right = knot_at(grid, i, span + 1 + r, KNOTS)
            share = values[r] / (right - left)
            shares = shares + (share,)
            raised = raised + (carried + (right - x) * share,)
            carried = (x - left) * share
        values = raised + (carried,)
    if SLOPES:
        values = ()
        for d in tl.static_range(ORDER + 1):
            slope = tl.full(x.shape, 0.0, tl.float32)
            if d > 0:
                slope += ORDER * shares[d - 1]
            if d < ORDER:
                slope -= ORDER * shares[d]
            values = values + (slope,)
    inside = (span >= 0) & (span < KNOTS - 1)
    kept = ()
    for d in tl.static_range(ORDER + 1):
        basis = span - ORDER + d
        value = tl.where(inside & (basis >= 0) & (basis < KNOTS - 1 - ORDER), values[d], 0.0)
        if ORDER > 0:
            value = tl.where(x == x, value, x)  # NaN where x is, as the recursion gives
        kept = kept + (value,)
    return span - ORDER, kept


@triton.jit
def edges(
    base,
    spline,
    scaler,
    edge,
    valid,
    smooth,
    first,
    values,
    BASES: tl.constexpr,
    ORDER: tl.constexpr,
):
    """Return base * smooth + scaler * sum_d spline[first + d] * values[d] for a tile of edges.

    `smooth`, `first` and `values` belong to the inputs: [1, inputs], or scalars where there is one.
    """
    total = tl.full(edge.shape, 0.0, tl.float32)
    for d in tl.static_range(ORDER + 1):
        basis = tl.broadcast_to(first + d, edge.shape)
        exists = valid & (basis >= 0) & (basis < BASES)
        weight = tl.load(spline + edge * BASES + basis, mask=exists, other=0.0).to(tl.float32)
        total += weight * values[d]
    scale = tl.load(scaler + edge, mask=valid, other=0.0).to(tl.float32)
    return tl.load(base + edge, mask=valid, other=0.0).to(tl.float32) * smooth + scale * total


@triton.jit
def forward(
    x,
    grid,
    base,
    spline,
    scaler,
    out,
    inputs,
    outputs,
    KNOTS: tl.constexpr,
    ORDER: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
):
    """One layer: a program makes OUT outputs of one row, IN inputs at a time."""
    blocks = (outputs + OUT - 1) // OUT
    row = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks).to(tl.int64) * OUT + tl.arange(0, OUT)[:, None]
    total = tl.full((OUT, IN), 0.0, tl.float32)
    for start in range(0, inputs, IN):
        i = start + tl.arange(0, IN).to(tl.int64)[None, :]
        here = i < inputs
        at = tl.load(x + row * inputs + i, mask=here, other=0.0).to(tl.float32)
        first, values = local_splines(at, grid, tl.where(here, i, 0), KNOTS, ORDER, False)
        valid = (o < outputs) & here
        edge = o * inputs + i
        smooth = at / (1.0 + tl.exp(-at))
        total += edges(base, spline, scaler, edge, valid, smooth, first, values, KNOTS - 1 - ORDER, ORDER)
    value = tl.reduce(total, 1, add, keep_dims=True).to(out.dtype.element_ty)
    tl.store(out + row * outputs + o, value, mask=o < outputs)


@triton.jit
def backward_x(
    grad,
    x,
    grid,
    base,
    spline,
    scaler,
    grad_x,
    inputs,
    outputs,
    KNOTS: tl.constexpr,
    ORDER: tl.constexpr,
    OUT: tl.constexpr,
):
    """Gradient in x: a program takes one input of one row, OUT outputs at a time."""
    row = (tl.program_id(0) // inputs).to(tl.int64)
    i = (tl.program_id(0) % inputs).to(tl.int64)
    at = tl.load(x + row * inputs + i).to(tl.float32)
    first, slopes = local_splines(at, grid, i, KNOTS, ORDER, True)
    sigmoid = 1.0 / (1.0 + tl.exp(-at))
    smooth = sigmoid * (1.0 + at * (1.0 - sigmoid))
    total = tl.full((OUT,), 0.0, tl.float32)
    for start in range(0, outputs, OUT):
        o = start + tl.arange(0, OUT).to(tl.int64)
        valid = o < outputs
        g = tl.load(grad + row * outputs + o, mask=valid, other=0.0).to(tl.float32)
        edge = o * inputs + i
        total += g * edges(base, spline, scaler, edge, valid, smooth, first, slopes, KNOTS - 1 - ORDER, ORDER)
    tl.store(grad_x + row * inputs + i, tl.reduce(total, 0, add).to(grad_x.dtype.element_ty))


@triton.jit
def all_splines(x, first, values, BASES: tl.constexpr, ORDER: tl.constexpr):
    """Return the values of all bases from those of the ORDER + 1 from `first` on."""
    bases = ()
    for b in tl.static_range(BASES):
        basis = tl.full(x.shape, 0.0, tl.float32)
        if ORDER > 0:
            basis = tl.where(x == x, basis, x)  # NaN where x is, as the recursion gives
        for d in tl.static_range(ORDER + 1):
            basis = tl.where(first + d == b, values[d], basis)
        bases = bases + (basis,)
    return bases


@triton.jit
def backward_weights(
    grad,
    x,
    grid,
    spline,
    scaler,
    grad_base,
    grad_spline,
    grad_scaler,
    rows,
    inputs,
    outputs,
    KNOTS: tl.constexpr,
    ORDER: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
):
    """Gradients of the weights of OUT x IN edges: a thread adds up the edges of one input over all rows, in order."""
    BASES: tl.constexpr = KNOTS - 1 - ORDER
    blocks = (inputs + IN - 1) // IN
    i = (tl.program_id(0) % blocks).to(tl.int64) * IN + tl.arange(0, IN)
    o = (tl.program_id(0) // blocks).to(tl.int64) * OUT
    here = i < inputs
    of_base = zeros(OUT, IN)
    of_spline = zeros(OUT * BASES, IN)
    x += i
    grad += o
    for _ in range(rows):
        at = tl.load(x, mask=here, other=0.0).to(tl.float32)
        smooth = at / (1.0 + tl.exp(-at))
        first, values = local_splines(at, grid, tl.where(here, i, 0), KNOTS, ORDER, False)
        bases = all_splines(at, first, values, BASES, ORDER)
        base_sums = ()
        spline_sums = ()
        for j in tl.static_range(OUT):
            g = tl.load(grad + j, mask=o + j < outputs, other=0.0).to(tl.float32)
            base_sums = base_sums + (of_base[j] + g * smooth,)
            for b in tl.static_range(BASES):
                spline_sums = spline_sums + (of_spline[j * BASES + b] + g * bases[b],)
        of_base = base_sums
        of_spline = spline_sums
        x += inputs
        grad += outputs
    for j in tl.static_range(OUT):
        valid = i < tl.where(o + j < outputs, inputs, 0)
        edge = (o + j) * inputs + i
        scale = tl.load(scaler + edge, mask=valid, other=0.0).to(tl.float32)
        of_scaler = tl.full((IN,), 0.0, tl.float32)
        for b in tl.static_range(BASES):
            place = edge * BASES + b
            total = of_spline[j * BASES + b]
            of_scaler += total * tl.load(spline + place, mask=valid, other=0.0).to(tl.float32)
            tl.store(grad_spline + place, (total * scale).to(grad_spline.dtype.element_ty), mask=valid)
        tl.store(grad_base + edge, of_base[j].to(grad_base.dtype.element_ty), mask=valid)
        tl.store(grad_scaler + edge, of_scaler.to(grad_scaler.dtype.element_ty), mask=valid)


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
            launch("kan_linear", forward, programs, arguments, OPTIONS)
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
    launch("kan_linear_backward", backward_x, x.numel(), arguments, OPTIONS)


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
    launch("kan_linear_backward", backward_weights, programs, arguments, {**OPTIONS, "num_warps": 1})

"""`predict`, `predict_backward` and `predict_l1`: the forecast, its gradients, and its loss with gradients in one pass.

S_k = sum g h_k, S_b = sum g, for a loss also sum |error|; g is the gradient of the forecast. Sums are float32: over a
thread's vector, over its tiles, over the program's threads, and over programs in `finish`, always in the same order and
without atomics. Tensors that share one dense layout are read as they lie in memory; others are first made contiguous,
and `out` is then written through a temporary.
"""
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment, misc"
# ruff: noqa: RUF005
# mypy does not know the types of Triton's language, which has no starred tuples.

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lesa_kernels.backends.triton.forecast import launch_combine, mixed
from lesa_kernels.backends.triton.launch import (
    OPTIONS,
    contiguous,
    in_memory_order,
    launch,
    on_device_of,
    power_of_2,
    share_dense_layout,
    skew_of,
)
from lesa_kernels.backends.triton.tiles import Pass, add, tile_of, write_partials, zeros
from lesa_kernels.ops.register import fresh_like

# Some 20 run at a time: several times as many leave no long tail, and `finish` reads little.
WARPS_PER_PROCESSOR = 64
FINISH_TILE = 4096


@triton.jit
def added(sums, slopes, held, K: tl.constexpr):
    """Return S_0 ... S_{K-1}, S_b with a tile's terms added."""
    total = ()
    for k in tl.static_range(K):
        total = total + (sums[k] + tl.reduce(slopes * held[k], 1, add),)
    return total + (sums[K] + tl.reduce(slopes, 1, add),)


@triton.jit(do_not_specialize=["skew"])
def backward(
    grad,
    history,
    grad_history,
    partials,
    weight,
    weight_stride,
    gain,
    numel,
    skew,
    tiles,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Partial sums of `predict_backward` over `tiles` tiles a program; writes the history's gradients, if given."""
    scale = tl.load(gain).to(tl.float32)
    sums = zeros(K + 1, ROWS)
    first = tl.program_id(0).to(tl.int64) * tiles
    for tile in range(first, first + tiles):
        position = tile_of(tile, skew, ROWS, WIDTH)
        inside = position < numel
        slopes = tl.load(grad + position, mask=inside, other=0.0).to(tl.float32)
        held = ()
        for k in tl.static_range(K):
            held = held + (tl.load(history[k] + position, mask=inside, other=0.0).to(tl.float32),)
        sums = added(sums, slopes, held, K)
        if grad_history is not None:
            for k in tl.static_range(K):
                factor = scale * tl.load(weight + k * weight_stride).to(tl.float32)
                if k == K - 1:
                    factor += 1.0
                value = (slopes * factor).to(grad.dtype.element_ty)
                tl.store(grad_history[k] + position, value, mask=inside)
    write_partials(partials, sums, K + 1)


@triton.jit(do_not_specialize=["skew"])
def l1(
    history,
    target,
    out,
    partials,
    weight,
    weight_stride,
    bias,
    gain,
    numel,
    skew,
    tiles,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Partial sums of `predict_l1` over `tiles` tiles a program; writes the rounded forecast where `out` is given."""
    scale = tl.load(gain).to(tl.float32)
    sums = zeros(K + 1, ROWS)
    loss = tl.full((ROWS,), 0.0, tl.float32)
    first = tl.program_id(0).to(tl.int64) * tiles
    for tile in range(first, first + tiles):
        position = tile_of(tile, skew, ROWS, WIDTH)
        inside = position < numel
        held = ()
        for k in tl.static_range(K):
            held = held + (tl.load(history[k] + position, mask=inside, other=0.0).to(tl.float32),)
        wanted = tl.load(target + position, mask=inside, other=0.0).to(tl.float32)
        forecast = held[K - 1] + scale * mixed(held, weight, weight_stride, bias, K)
        if out is not None:
            tl.store(out + position, forecast.to(out.dtype.element_ty), mask=inside)
        error = tl.where(inside, forecast - wanted, 0.0)
        # The derivative of |error|: -1, 0 or 1, and NaN for NaN.
        slopes = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, error))
        sums = added(sums, slopes, held, K)
        loss += tl.reduce(tl.abs(error), 1, add)
    write_partials(partials, sums + (loss,), K + 2)


@triton.jit(do_not_specialize=["inputs"])
def finish(
    partials,
    programs,
    weight,
    weight_stride,
    bias,
    gain,
    loss,
    grad_weight,
    grad_bias,
    grad_gain,
    count,
    inputs,
    SUMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Add up `partials` in order and write the gradients, divided by `count`; the loss too where one is given.

    SUMS, a power of two, is no less than the rows of `partials`: one for each input, S_b, and the loss where there is.
    """
    row = tl.arange(0, SUMS)
    of_input = row < inputs
    rows = inputs + 1 if loss is None else inputs + 2
    sums = tl.full((SUMS, CHUNK), 0.0, tl.float32)
    for start in range(0, programs, CHUNK):
        column = start + tl.arange(0, CHUNK)[None, :]
        here = (row[:, None] < rows) & (column < programs)
        sums += tl.load(partials + row[:, None] * programs + column, mask=here, other=0.0)
    totals = tl.reduce(sums, 1, add) / count
    total = tl.reduce(tl.where(row == inputs, totals, 0.0), 0, add)
    weights = tl.load(weight + row * weight_stride, mask=of_input, other=0.0).to(tl.float32)
    slope = tl.reduce(tl.where(of_input, weights * totals, 0.0), 0, add) + tl.load(bias).to(tl.float32) * total
    scale = tl.load(gain).to(tl.float32)
    tl.store(grad_weight + row, (scale * totals).to(grad_weight.dtype.element_ty), mask=of_input)
    tl.store(grad_bias, (scale * total).to(grad_bias.dtype.element_ty))
    tl.store(grad_gain, slope.to(grad_gain.dtype.element_ty))
    if loss is not None:
        tl.store(loss, tl.reduce(tl.where(row == inputs + 1, totals, 0.0), 0, add))


def predict(history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """`reference.predict`; a history that is not contiguous is copied."""
    out = fresh_like(history[0])
    launch_combine("predict", contiguous(history), [out], weight, bias, gain)
    return out


def _finish(
    op: str, run: Pass, weight: Tensor, bias: Tensor, gain: Tensor, loss: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight, bias and gain, divided by a count; fills in the loss."""
    gradients = fresh_like(weight), fresh_like(bias), fresh_like(gain)
    sums = power_of_2(run.partials.shape[0])
    parameters = (weight, weight.stride(0), bias, gain, loss)
    sizes = (count, weight.numel(), sums, FINISH_TILE // sums)
    launch(op, finish, 1, (run.partials, run.programs, *parameters, *gradients, *sizes), OPTIONS)
    return gradients


def predict_backward(
    grad: Tensor, history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor, history_needs_grad: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """`reference.predict_backward`; tensors that do not share a dense layout are copied."""
    op = "predict_backward"
    inputs = len(history)
    grad_history = [fresh_like(feature) for feature in history] if history_needs_grad else []
    # Gradients of the history are contiguous, whatever the history is.
    grad, *history = contiguous([grad, *history]) if history_needs_grad else in_memory_order([grad, *history])
    with on_device_of(grad):
        run = Pass(grad, inputs, inputs + 1, WARPS_PER_PROCESSOR)
        run.launch(
            op,
            backward,
            grad,
            tuple(history),
            tuple(grad_history) or None,
            run.partials,
            weight,
            weight.stride(0),
            gain,
            grad.numel(),
            skew_of(grad.numel(), (grad, *history, *grad_history)),
        )
        return (grad_history, *_finish(op, run, weight, bias, gain, None, 1))


def predict_l1(
    history: Sequence[Tensor], target: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.predict_l1`; tensors that do not share a dense layout are copied."""
    op = "predict_l1"
    inputs = len(history)
    features: Sequence[Tensor] = [*history, target]
    direct = out is None or share_dense_layout([*features, out])
    features = in_memory_order(features) if direct else contiguous(features)
    *history, target = features
    written = out if direct or out is None else fresh_like(out)
    loss = target.new_empty((), dtype=torch.float32)
    with on_device_of(target):
        run = Pass(target, inputs, inputs + 2, WARPS_PER_PROCESSOR)
        run.launch(
            op,
            l1,
            tuple(history),
            target,
            written,
            run.partials,
            weight,
            weight.stride(0),
            bias,
            gain,
            target.numel(),
            skew_of(target.numel(), features if written is None else (*features, written)),
        )
        gradients = _finish(op, run, weight, bias, gain, loss, max(target.numel(), 1))
    if out is not None and written is not None and written is not out:
        out.copy_(written)
    return (loss, *gradients)

"""`predict_backward` and `predict_l1`: one pass over the features, then one small launch that finishes the sums.

Tensors that share one dense layout are walked as they lie in memory; others are first made contiguous, and `out` is
then written through a temporary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lesa_kernels.backends.triton.arguments import (
    contiguous,
    fresh_like,
    on_device_of,
    power_of_2,
    share_dense_layout,
    skew_of,
    walkable,
)
from lesa_kernels.backends.triton.kernels import reduce
from lesa_kernels.backends.triton.launch import launch
from lesa_kernels.backends.triton.passes import OPTIONS, Pass

# Some 20 run at a time: several times as many leave no long tail, and `finish` reads little.
WARPS_PER_PROCESSOR = 64
FINISH_TILE = 4096


def _finish(
    op: str, run: Pass, weight: Tensor, bias: Tensor, gain: Tensor, loss: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of weight, bias and gain, divided by a count; fills in the loss."""
    gradients = fresh_like(weight), fresh_like(bias), fresh_like(gain)
    sums = power_of_2(run.partials.shape[0])
    parameters = (weight, weight.stride(0), bias, gain, loss)
    sizes = (count, weight.numel(), sums, FINISH_TILE // sums)
    launch(op, reduce.finish, 1, (run.partials, run.programs, *parameters, *gradients, *sizes), OPTIONS)
    return gradients


def predict_backward(
    grad: Tensor, history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor, history_needs_grad: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """`reference.predict_backward`; tensors that do not share a dense layout are copied."""
    op = "predict_backward"
    inputs = len(history)
    grad_history = [fresh_like(feature) for feature in history] if history_needs_grad else []
    # Gradients of the history are contiguous, whatever the history is.
    grad, *history = contiguous([grad, *history]) if history_needs_grad else walkable([grad, *history])
    with on_device_of(grad):
        run = Pass(grad, inputs, inputs + 1, WARPS_PER_PROCESSOR)
        run.launch(
            op,
            reduce.backward,
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
    features = walkable(features) if direct else contiguous(features)
    *history, target = features
    written = out if direct or out is None else fresh_like(out)
    loss = target.new_empty((), dtype=torch.float32)
    with on_device_of(target):
        run = Pass(target, inputs, inputs + 2, WARPS_PER_PROCESSOR)
        run.launch(
            op,
            reduce.l1,
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

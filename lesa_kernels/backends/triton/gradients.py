"""`predict_backward` and `predict_l1`: one pass over the features, then one small launch that finishes the sums.

Tensors that share one dense layout are walked as they lie in memory; others are first made contiguous, and `out` is
then written through a temporary. The number of programs follows from N and the device, so that the same input gives the
same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from lesa_kernels import contract
from lesa_kernels.backends.triton.arguments import (
    blocks_of,
    check_history,
    contiguous,
    fresh_like,
    on_device_of,
    power_of_2,
    share_dense_layout,
    skew_of,
    walkable,
)
from lesa_kernels.backends.triton.kernels import reduce

WARPS = 4
OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}
ROWS = 32 * WARPS  # one row of a tile for each thread
VECTOR_BYTES = 16
HELD_FLOATS = 64
# At four warps each, some five run at a time: several times as many leave no long tail, and `finish` reads little.
PROGRAMS_PER_PROCESSOR = 16
# A float32 sum of one thread never has more terms than these tiles: 2^31 elements stay as exact as 2^20.
MOST_TILES = 64
FINISH_CHUNK = 1024


@functools.cache
def _processors(device: torch.device) -> int:
    """Return the multiprocessors of a device; 1 for the CPU, where kernels are interpreted."""
    if device.type == "cpu":
        return 1
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return int(properties["multiprocessor_count"])


class _Pass:
    """The shape of a pass over N elements of K + 1 features and where its programs leave their sums."""

    def __init__(self, feature: Tensor, inputs: int, sums: int) -> None:
        self.width = max(min(VECTOR_BYTES // feature.element_size(), HELD_FLOATS // power_of_2(inputs)), 1)
        tiles = blocks_of(feature.numel(), ROWS * self.width)
        self.tiles_each = min(blocks_of(tiles, _processors(feature.device) * PROGRAMS_PER_PROCESSOR), MOST_TILES)
        self.programs = blocks_of(tiles, max(self.tiles_each, 1))
        self.partials = feature.new_empty((sums, self.programs), dtype=torch.float32)

    def launch(self, kernel: Any, *arguments: Any, inputs: int) -> None:
        """Launch a kernel of `kernels.reduce`, if there is anything to add up."""
        if self.programs > 0:
            kernel[(self.programs,)](*arguments, self.tiles_each, inputs, ROWS, self.width, **OPTIONS)

    def finish(
        self, weight: Tensor, bias: Tensor, gain: Tensor, loss: Tensor | None, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of weight, bias and gain, divided by a count; fills in the loss."""
        gradients = fresh_like(weight), fresh_like(bias), fresh_like(gain)
        reduce.finish[(1,)](
            self.partials,
            self.programs,
            weight,
            weight.stride(0),
            bias,
            gain,
            loss,
            *gradients,
            count,
            weight.numel(),
            FINISH_CHUNK,
            **OPTIONS,
        )
        return gradients


def predict_backward(
    grad: Tensor, history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor, history_needs_grad: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """`reference.predict_backward`; tensors that do not share a dense layout are copied."""
    op = "predict_backward"
    check_history(op, history)
    contract.check_predict(op, history, weight, bias, gain)
    contract.check_like(op, "grad", grad, "history[0]", history[0])
    inputs = len(history)
    grad_history = [fresh_like(feature) for feature in history] if history_needs_grad else []
    # Gradients of the history are contiguous, whatever the history is.
    grad, *history = contiguous([grad, *history]) if history_needs_grad else walkable([grad, *history])
    with on_device_of(grad):
        run = _Pass(grad, inputs, inputs + 1)
        run.launch(
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
            inputs=inputs,
        )
        return (grad_history, *run.finish(weight, bias, gain, None, 1))


def _check_out(op: str, history: Sequence[Tensor], target: Tensor, out: Tensor) -> None:
    """Check the tensor that receives a forecast."""
    contract.check_like(op, "out", out, "history[0]", history[0])
    contract.check_distinct_elements(op, "out", out)
    contract.check_apart(op, "out", out, "target", target)
    for k, feature in enumerate(history):
        contract.check_apart(op, "out", out, f"history[{k}]", feature)


def predict_l1(
    history: Sequence[Tensor], target: Tensor, weight: Tensor, bias: Tensor, gain: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.predict_l1`; tensors that do not share a dense layout are copied."""
    op = "predict_l1"
    check_history(op, history)
    contract.check_predict(op, history, weight, bias, gain)
    contract.check_like(op, "target", target, "history[0]", history[0])
    if out is not None:
        _check_out(op, history, target, out)
    inputs = len(history)
    features: Sequence[Tensor] = [*history, target]
    direct = out is None or share_dense_layout([*features, out])
    features = walkable(features) if direct else contiguous(features)
    *history, target = features
    written = out if direct or out is None else fresh_like(out)
    loss = target.new_empty((), dtype=torch.float32)
    with on_device_of(target):
        run = _Pass(target, inputs, inputs + 2)
        run.launch(
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
            inputs=inputs,
        )
        gradients = run.finish(weight, bias, gain, loss, max(target.numel(), 1))
    if out is not None and written is not None and written is not out:
        out.copy_(written)
    return (loss, *gradients)

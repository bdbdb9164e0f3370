"""Times the network of the gain, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import (
    kan_eager,
)
from benchmarks.cases import (
    COMPILED_STEP,
    EAGER_STEP,
    KAN_WIDTHS,
    LAYERS,
    compiled,
    copy_variant,
    implementations,
    kan_parameters,
)
from benchmarks.clock import Clock, Run
from benchmarks.harness import Case, Variant
from lesa_kernels.predictors.kan_network import KAN, KANLinear


def kan_by_ops(ops: Any, layers: Sequence[KANLinear], x: Tensor) -> list[Tensor]:
    """Output and gradients of all parameters for the sum of the output, by calling the ops themselves.

    Args:
        ops: what `implementations` returns.
        layers: the layers.
        x: [rows, I].

    Returns:
        [rows, O], then the gradients of base_weight, spline_weight and spline_scaler of each layer.
    """
    weights = [(layer.grid, *(tensor.detach() for tensor in kan_parameters([layer]))) for layer in layers]
    inputs = [x]
    for layer in weights:
        inputs.append(ops.kan_linear(inputs[-1], *layer))
    grad, gradients = torch.ones_like(inputs[-1]), list[Tensor]()
    for number in reversed(range(len(weights))):
        grad, *of_layer = ops.kan_linear_backward(grad, inputs[number], *weights[number])
        gradients = [*of_layer, *gradients]
    return [inputs[-1], *gradients]


def kan_case(rows: int, clock: Clock) -> Case:
    """Three layers forward and backward on `rows` noise levels at once, float32: little data, many launches."""
    device = clock.device
    network = KAN(KAN_WIDTHS).to(device)
    layers = [layer for layer in network.layers if isinstance(layer, KANLinear)]
    wide = [layer for layer in KAN(KAN_WIDTHS).to(device, torch.float64).layers if isinstance(layer, KANLinear)]
    for layer, copy in zip(layers, wide, strict=True):
        copy.load_state_dict(layer.state_dict())
    sets = 2
    inputs = [2 * torch.rand(rows, KAN_WIDTHS[0], device=device) - 1 for _ in range(sets)]

    def step(forward: Callable[[Tensor], Tensor], layers: Sequence[KANLinear]) -> Callable[[Tensor], list[Tensor]]:
        def run(x: Tensor) -> list[Tensor]:
            out = forward(x)
            return [out.detach(), *torch.autograd.grad(out.sum(), kan_parameters(layers))]

        return run

    def rotated(of: Callable[[Tensor], list[Tensor]]) -> Run:
        return lambda turn: of(inputs[turn % sets])

    def direct(ops: Any) -> Run:
        return rotated(lambda x: kan_by_ops(ops, layers, x))

    def plain(network: Callable[..., Tensor]) -> Run:
        return rotated(step(lambda x: network(x, layers), layers))

    variants = [
        Variant("lesa::kan_linear and autograd", rotated(step(network, layers)), LAYERS),
        *(Variant(f"{name}kan_linear, by hand", direct(ops), LAYERS) for name, ops in implementations(device).items()),
        *compiled(COMPILED_STEP, kan_eager, plain, LAYERS, device),
        Variant(EAGER_STEP, plain(kan_eager), LAYERS),
    ]
    want = step(lambda x: kan_eager(x, wide), wide)(inputs[0].double())
    scale = [tensor.abs().max() for tensor in want]
    # Read: the weights, forward and backward. Written: their gradients.
    moved = 3 * sum(tensor.numel() * tensor.element_size() for tensor in kan_parameters(layers))
    return Case(
        "kan_linear",
        f"{'-'.join(map(str, KAN_WIDTHS))}, {rows} rows, forward and backward",
        moved,
        want,
        scale,
        [*variants, copy_variant(moved, sets, device)],
        context=torch.enable_grad,
        sets=sets,
    )

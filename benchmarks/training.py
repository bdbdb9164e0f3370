"""The cases of training: loss and gradients of one forecast, and the network that yields the gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.baselines import gram_by_dots, gram_by_matrix, kan_eager, published_eager, published_l1
from benchmarks.cases import (
    KAN_WIDTHS,
    SIZES,
    copy_variant,
    dtype_name,
    half_rounded,
    implementations,
    random_features,
    wider,
    with_captured,
)
from benchmarks.clock import Clock, Run
from benchmarks.harness import Case, Variant, sets_needed
from lesa_kernels import reference
from lesa_kernels.ops import predict_l1_loss
from lesa_kernels.predictors.kan import KAN, KANLinear
from lesa_kernels.reference import Tolerance

EAGER_STEP = "eager forward and backward"
COMPILED_STEP = "torch.compile of the eager form"

# Sums of 1e7 terms of size 1, and signs that turn where forecast and target meet.
SUMS = Tolerance(2e-5, 1e-6)
# The same, added up in float32.
FLOAT32_SUMS = Tolerance(1e-3, 1e-6)
# Three layers of up to 256 x 9 float32 terms, relative to the largest value.
LAYERS = Tolerance(5e-5, 1e-6)


@torch.inference_mode()
def gram_case(size: str, clock: Clock, count: int = 8, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The sums of products that a closed-form fit needs."""
    shape, device = SIZES[size], clock.device
    moved = count * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    features = random_features(shape, count, dtype, sets, device)

    def of(make: Callable[[list[Tensor]], Tensor]) -> Run:
        return lambda turn: [make(features[turn % sets])]

    variants = [
        *(Variant(f"{name}gram", of(ops.gram), SUMS) for name, ops in implementations(device).items()),
        Variant("torch: stack and a float64 product", of(gram_by_matrix), SUMS),
        Variant("torch: a dot product for each pair", of(gram_by_dots), FLOAT32_SUMS),
        copy_variant(moved, sets, device),
    ]
    return Case(
        "gram",
        f"{size}, K={count}, {dtype_name(dtype)}",
        moved,
        [reference.gram(features[0])],
        [reference.gram([feature.abs() for feature in features[0]])],
        variants,
    )


def predict_l1_case(size: str, clock: Clock, count: int = 8, dtype: torch.dtype = torch.bfloat16) -> Case:
    """One training step of a forecast: the loss and the gradients of weight, bias and gain."""
    shape, device = SIZES[size], clock.device
    moved = (count + 1) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    features = random_features(shape, count + 1, dtype, sets, device)
    parameters = [torch.randn(length, device=device, requires_grad=True) for length in (count, 1, 1)]
    constants = [parameter.detach() for parameter in parameters]
    compiled: Callable[..., Tensor] = torch.compile(published_l1, fullgraph=True, dynamic=False)

    def at(turn: int) -> tuple[list[Tensor], Tensor]:
        *history, target = features[turn % sets]
        return history, target

    def served(ops: Any) -> Run:
        return lambda turn: ops.predict_l1(*at(turn), *constants, None)

    def through_autograd(loss_of: Callable[..., Tensor]) -> Run:
        def run(turn: int) -> list[Tensor]:
            loss = loss_of(*at(turn), *parameters)
            return [loss.detach(), *torch.autograd.grad(loss, parameters)]

        return run

    history, target = at(0)
    wide = [tensor.to(wider(dtype)) for tensor in (*history, target, *constants)]
    weight, bias, gain = wide[count + 1 :]
    want = reference.predict_l1(wide[:count], wide[count], weight, bias, gain, None)
    rounded = half_rounded(dtype)
    variants = [
        *(Variant(f"{name}predict_l1", served(ops), SUMS) for name, ops in implementations(device).items()),
        Variant("predict_l1_loss and autograd", through_autograd(predict_l1_loss), SUMS),
        Variant(COMPILED_STEP, through_autograd(compiled), rounded),
        Variant(EAGER_STEP, through_autograd(published_l1), rounded),
        copy_variant(moved, sets, device),
    ]
    # Each result is a mean of terms of about the size of the features, which is 1, times the parameters'.
    scale = [torch.ones((), device=device) + max(parameter.abs().max() for parameter in constants)] * 4
    return Case(
        "predict_l1", f"{size}, K={count}, {dtype_name(dtype)}", moved, want, scale, variants, context=torch.enable_grad
    )


def _parameters(layers: Sequence[KANLinear]) -> list[Tensor]:
    return [tensor for layer in layers for tensor in (layer.base_weight, layer.spline_weight, layer.spline_scaler)]


def kan_by_ops(ops: Any, layers: Sequence[KANLinear], x: Tensor) -> list[Tensor]:
    """Output and gradients of all parameters for the sum of the output, by calling the ops themselves.

    Args:
        ops: what `implementations` returns.
        layers: the layers.
        x: [rows, I].

    Returns:
        [rows, O], then the gradients of base_weight, spline_weight and spline_scaler of each layer.
    """
    weights = [(layer.grid, *(tensor.detach() for tensor in _parameters([layer]))) for layer in layers]
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
    compiled: Callable[..., Tensor] = torch.compile(kan_eager, fullgraph=True, dynamic=False)

    def step(forward: Callable[[Tensor], Tensor], layers: Sequence[KANLinear]) -> Callable[[Tensor], list[Tensor]]:
        def run(x: Tensor) -> list[Tensor]:
            out = forward(x)
            return [out.detach(), *torch.autograd.grad(out.sum(), _parameters(layers))]

        return run

    def rotated(of: Callable[[Tensor], list[Tensor]]) -> Run:
        return lambda turn: of(inputs[turn % sets])

    def direct(ops: Any) -> Run:
        return rotated(lambda x: kan_by_ops(ops, layers, x))

    variants = [
        Variant("lesa::kan_linear and autograd", rotated(step(network, layers)), LAYERS),
        *(Variant(f"{name}kan_linear, by hand", direct(ops), LAYERS) for name, ops in implementations(device).items()),
        Variant(COMPILED_STEP, rotated(step(lambda x: compiled(x, layers), layers)), LAYERS),
        Variant(EAGER_STEP, rotated(step(lambda x: kan_eager(x, layers), layers)), LAYERS),
    ]
    want = step(lambda x: kan_eager(x, wide), wide)(inputs[0].double())
    scale = [tensor.abs().max() for tensor in want]
    # Read: the weights, forward and backward. Written: their gradients.
    moved = 3 * sum(tensor.numel() * tensor.element_size() for tensor in _parameters(layers))
    return Case(
        "kan_linear",
        f"{'-'.join(map(str, KAN_WIDTHS))}, {rows} rows, forward and backward",
        moved,
        want,
        scale,
        [*with_captured(variants, sets, device), copy_variant(moved, sets, device)],
        context=torch.enable_grad,
    )


def _step(parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, loss: Tensor) -> list[Tensor]:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return [loss.detach(), *(parameter.grad for parameter in parameters if parameter.grad is not None)]


def training_step_case(size: str, clock: Clock, count: int = 8, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A whole training step on one forecast: the gain's network, loss and forecast, gradients, AdamW.

    The learning rate is 0, so that every repetition starts from the same parameters; the arithmetic is AdamW's.
    """
    shape, device = SIZES[size], clock.device
    moved = (count + 2) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    features = random_features(shape, count + 2, dtype, sets, device)
    network = KAN(KAN_WIDTHS).to(device)
    layers = [layer for layer in network.layers if isinstance(layer, KANLinear)]
    weight, bias = (torch.randn(length, device=device, requires_grad=True) for length in (count, 1))
    parameters = [weight, bias, *_parameters(layers)]
    optimizer = torch.optim.AdamW(parameters, lr=0.0)
    level = 2 * torch.rand(1, KAN_WIDTHS[0], device=device) - 1

    def ours(turn: int) -> list[Tensor]:
        *history, target, out = features[turn % sets]
        loss = predict_l1_loss(history, target, weight, bias, network(level).reshape(1), out)
        return [*_step(parameters, optimizer, loss)[:3], out]

    def published(turn: int) -> list[Tensor]:
        *history, target, _ = features[turn % sets]
        forecast = published_eager(history, weight, bias, kan_eager(level, layers).reshape(1))
        loss = functional.l1_loss(forecast, target)
        return [*_step(parameters, optimizer, loss)[:3], forecast.detach()]

    *history, target, _ = features[0]
    wide = [tensor.detach().to(wider(dtype)) for tensor in (*history, target)]
    mixing = [tensor.detach().to(wider(dtype)) for tensor in (weight, bias)]
    gain = kan_eager(level, layers).detach().reshape(1).to(wider(dtype))
    loss, of_weight, of_bias, _ = reference.predict_l1(wide[:count], wide[count], mixing[0], mixing[1], gain, None)
    forecast = reference.predict(wide[:count], mixing[0], mixing[1], gain)
    size_of = torch.ones((), device=device) + weight.detach().abs().sum() + bias.detach().abs().sum()
    scale = [size_of, size_of, size_of, size_of * max(feature.abs().max() for feature in wide[:count])]
    return Case(
        "training step",
        f"{size}, K={count}, {dtype_name(dtype)}, KAN {'-'.join(map(str, KAN_WIDTHS))}, AdamW",
        moved,
        [loss, of_weight, of_bias, forecast],
        scale,
        [
            Variant("lesa: predict_l1_loss, kan_linear", ours, half_rounded(dtype)),
            Variant(EAGER_STEP, published, half_rounded(dtype)),
            copy_variant(moved, sets, device),
        ],
        context=torch.enable_grad,
    )

"""The cases of training: loss and gradients of one forecast, and the network that yields the gain."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.baselines import (
    folded_backward,
    gram_by_dots,
    gram_by_matrix,
    kan_eager,
    published_eager,
    published_l1,
)
from benchmarks.cases import (
    KAN_WIDTHS,
    SIZES,
    compiled,
    copy_variant,
    dtype_name,
    half_rounded,
    implementations,
    random_features,
    wider,
)
from benchmarks.clock import Clock, Run
from benchmarks.harness import Case, Variant, sets_needed
from lesa_kernels.ops import TOLERANCES, Tolerance, predict_l1_loss, reference
from lesa_kernels.predictors.kan import KAN, KANLinear

EAGER_BACKWARD = "autograd of the published form, backward only"
COMPILED_BACKWARD = "torch.compile of the folded backward"
EAGER_STEP = "eager forward and backward"
COMPILED_STEP = "torch.compile of the eager form"

# Sums of 1e7 terms of size 1, and signs that turn where forecast and target meet.
SUMS = Tolerance(2e-5, 1e-6)
# The same, added up in float32.
FLOAT32_SUMS = Tolerance(1e-3, 1e-6)
# Three layers of up to 256 x 9 float32 terms, relative to the largest value.
LAYERS = Tolerance(5e-5, 1e-6)


@torch.no_grad()
def gram_case(size: str, clock: Clock, count: int = 9, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The sums of products that a closed-form fit needs, of a history and its target."""
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
        sets=sets,
    )


@torch.no_grad()
def predict_backward_case(size: str, clock: Clock, count: int = 8, dtype: torch.dtype = torch.bfloat16) -> Case:
    """The gradients of one forecast: of its history, weight, bias and gain."""
    shape, device = SIZES[size], clock.device
    moved = (2 * count + 1) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    features = random_features(shape, count + 1, dtype, sets, device)
    parameters = [torch.randn(length, device=device) for length in (count, 1, 1)]

    def of(backward: Callable[..., Sequence[Tensor]]) -> Run:
        def run(turn: int) -> Sequence[Tensor]:
            grad, *history = features[turn % sets]
            return backward(grad, history, *parameters)

        return run

    def served(ops: Any) -> Run:
        def backward(*inputs: Any) -> list[Tensor]:
            of_history, *of_parameters = ops.predict_backward(*inputs, True)
            return [*of_history, *of_parameters]

        return of(backward)

    graphs = []
    with torch.enable_grad():
        for _, *history in features:
            leaves = [tensor.detach().requires_grad_() for tensor in (*history, *parameters)]
            graphs.append((published_eager(leaves[:count], *leaves[count:]), leaves))

    def eager(turn: int) -> Sequence[Tensor]:
        forecast, leaves = graphs[turn % sets]
        return torch.autograd.grad(forecast, leaves, features[turn % sets][0], retain_graph=True)

    wide = [tensor.to(wider(dtype)) for tensor in (*features[0], *parameters)]
    terms = [tensor.abs() for tensor in wide]
    of_history, *want = reference.predict_backward(wide[0], wide[1:-3], wide[-3], wide[-2], wide[-1], True)
    sizes_of_history, *sizes = reference.predict_backward(terms[0], terms[1:-3], terms[-3], terms[-2], terms[-1], True)
    exact = TOLERANCES[dtype]
    # Sums of as many terms are off by far less than a rounded element is.
    scale = [
        *sizes_of_history,
        *(sum_.abs() + SUMS.relative / exact.relative * size for sum_, size in zip(want, sizes, strict=True)),
    ]
    return Case(
        "predict_backward",
        f"{size}, K={count}, {dtype_name(dtype)}",
        moved,
        [*of_history, *want],
        scale,
        [
            *(Variant(f"{name}predict_backward", served(ops), exact) for name, ops in implementations(device).items()),
            *compiled(COMPILED_BACKWARD, folded_backward, of, exact, device),
            # Autograd runs on the stream of the forward pass, which no graph holds.
            Variant(EAGER_BACKWARD, eager, half_rounded(dtype), capture=False, both_modes=False),
            copy_variant(moved, sets, device),
        ],
        context=torch.no_grad,
        sets=sets,
    )


def predict_l1_case(size: str, clock: Clock, count: int = 8, dtype: torch.dtype = torch.bfloat16) -> Case:
    """One training step of a forecast: the loss and the gradients of weight, bias and gain."""
    shape, device = SIZES[size], clock.device
    moved = (count + 1) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    features = random_features(shape, count + 1, dtype, sets, device)
    parameters = [torch.randn(length, device=device, requires_grad=True) for length in (count, 1, 1)]
    constants = [parameter.detach() for parameter in parameters]

    def at(turn: int) -> tuple[list[Tensor], Tensor]:
        *history, target = features[turn % sets]
        return history, target

    def served(ops: Any) -> Run:
        return lambda turn: ops.predict_l1(*at(turn), *constants, None)

    def through_autograd(loss_of: Callable[..., Tensor]) -> Run:
        @torch.enable_grad()
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
        Variant("predict_l1_loss and autograd", through_autograd(predict_l1_loss), SUMS, both_modes=False),
        *compiled(COMPILED_STEP, published_l1, through_autograd, rounded, device),
        Variant(EAGER_STEP, through_autograd(published_l1), rounded, both_modes=False),
        copy_variant(moved, sets, device),
    ]
    # Each result is a mean of terms of about the size of the features, which is 1, times the parameters'.
    scale = [torch.ones((), device=device) + max(parameter.abs().max() for parameter in constants)] * 4
    return Case(
        "predict_l1",
        f"{size}, K={count}, {dtype_name(dtype)}",
        moved,
        want,
        scale,
        variants,
        context=torch.no_grad,
        sets=sets,
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

    def step(forward: Callable[[Tensor], Tensor], layers: Sequence[KANLinear]) -> Callable[[Tensor], list[Tensor]]:
        def run(x: Tensor) -> list[Tensor]:
            out = forward(x)
            return [out.detach(), *torch.autograd.grad(out.sum(), _parameters(layers))]

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
    moved = 3 * sum(tensor.numel() * tensor.element_size() for tensor in _parameters(layers))
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
            # The optimizer reads its step count on the host.
            Variant("lesa: predict_l1_loss, kan_linear", ours, half_rounded(dtype), capture=False),
            Variant(EAGER_STEP, published, half_rounded(dtype), capture=False),
            copy_variant(moved, sets, device),
        ],
        context=torch.enable_grad,
        sets=sets,
    )

"""Times one forecast, its gradients, its loss, and a whole training step on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.baselines import (
    folded_backward,
    folded_sum,
    kan_eager,
    published_eager,
    published_l1,
)
from benchmarks.cases import (
    ADDITION,
    COMPILED,
    COMPILED_BACKWARD,
    COMPILED_EAGER,
    COMPILED_STEP,
    EAGER,
    EAGER_BACKWARD,
    EAGER_STEP,
    INTO,
    KAN_WIDTHS,
    SIZES,
    SUMS,
    compiled,
    copy_variant,
    dtype_name,
    ends,
    half_rounded,
    implementations,
    kan_parameters,
    random_features,
    wider,
)
from benchmarks.clock import Clock, Run
from benchmarks.harness import Case, Variant, sets_needed
from lesa_kernels.ops import TOLERANCES, predict_l1_loss, reference
from lesa_kernels.predictors.kan_network import KAN, KANLinear


@torch.no_grad()
def predict_case(
    size: str,
    clock: Clock,
    count: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    small: bool = False,
    published: bool = True,
) -> Case:
    """One forecast of K features, slots of a ring: into fresh memory, and into the slot after them.

    `small` adds an addition, which shows what a call costs apart from its work. `published` adds the authors' form,
    which needs more memory at video sizes than machines have.
    """
    shape, device = SIZES[size], clock.device
    moved = (count + 1) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    rings = [torch.stack(features) for features in random_features(shape, count + 1, dtype, sets, device)]
    history = [list(ring[:count]) for ring in rings]
    weight, bias = (torch.randn(length, device=device) for length in (count, 1))
    layers = [layer for layer in KAN(KAN_WIDTHS).to(device).layers if isinstance(layer, KANLinear)]
    level = 2 * torch.rand(1, KAN_WIDTHS[0], device=device) - 1
    gain = kan_eager(level, layers).reshape(1)
    coefficients, offset = gain * weight, (gain * bias).reshape(())
    coefficients[-1] += 1
    exact = TOLERANCES[dtype]

    def at(turn: int) -> list[Tensor]:
        return history[turn % sets]

    def of(predict: Callable[..., Tensor]) -> Run:
        return lambda turn: [predict(at(turn), weight, bias, gain)]

    def folded(sum_: Callable[..., Tensor]) -> Run:
        return lambda turn: [sum_(at(turn), coefficients, offset)]

    def into(turn: int) -> list[Tensor]:
        ring = rings[turn % sets]
        torch.ops.lesa.forecast_into(ring, coefficients[None], offset[None], range(count), [count])
        return [ring[count]]

    def with_network(turn: int) -> list[Tensor]:
        return [published_eager(at(turn), weight, bias, kan_eager(level, layers).reshape(1))]

    variants = [
        *(Variant(f"{name}predict", of(ops.predict), exact) for name, ops in implementations(device).items()),
        Variant(INTO, into, exact),
        *compiled(COMPILED, folded_sum, folded, exact, device, tuned=True),
    ]
    if published:
        rounded = half_rounded(dtype)
        variants += [
            Variant(EAGER, of(published_eager), rounded),
            Variant(f"{EAGER} with its KAN", with_network, rounded),
            *compiled(COMPILED_EAGER, published_eager, of, rounded, device),
        ]
    if small:
        variants.append(Variant(ADDITION, lambda turn: [torch.add(*at(turn)[:2])], None))
    wide = [tensor.to(wider(dtype)) for tensor in (*map(ends, at(0)), weight, bias, gain)]
    return Case(
        "predict",
        f"{size}, K={count}, {dtype_name(dtype)}",
        moved,
        [reference.predict(wide[:count], *wide[count:])],
        [reference.predict([tensor.abs() for tensor in wide[:count]], *(tensor.abs() for tensor in wide[count:]))],
        [*variants, copy_variant(moved, sets, device)],
        checked=ends,
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
    parameters = [weight, bias, *kan_parameters(layers)]
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

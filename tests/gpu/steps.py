"""Every op with inputs that can be drawn anew in place, and what it must then return."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cases import assert_close, wide
from torch import Tensor

from lesa_kernels import reference

DEVICE = torch.device("cuda")
SHAPE = (3, 1031)
KAN_SHAPE = (5, 7, 6)  # rows, inputs, outputs

Expected = list[tuple[Tensor, Tensor]]
"""Of each output the value and the scale of its error, both float64."""


@dataclass(frozen=True)
class Step:
    """One op at work.

    Args:
        inputs: what `draw` fills, coefficients among them.
        run: calls the op of a namespace and returns what it wrote.
        expected: what that must be for the inputs as they are.
    """

    inputs: Sequence[Tensor]
    run: Callable[[Any], list[Tensor]]
    expected: Callable[[], Expected]

    def draw(self) -> None:
        """Fill the inputs with new values, in place."""
        for tensor in self.inputs:
            tensor.copy_(torch.randn(tensor.shape, device=tensor.device))

    def check(self, outputs: Sequence[Tensor]) -> None:
        """Compare outputs with the reference on the inputs as they are."""
        for got, (want, scale) in zip(outputs, self.expected(), strict=True):
            # Kernels on GPUs add up in float32, whatever holds the result.
            assert_close(got, want, scale.expand_as(want), torch.float32 if got.dtype == torch.float64 else got.dtype)


def implementations() -> dict[str, Any]:
    """Return name -> namespace of ops."""
    return {"lesa": torch.ops.lesa, "triton": importlib.import_module("lesa_kernels.backends.triton")}


def capture(run: Callable[[], list[Tensor]], warm: bool = True) -> tuple[Callable[[], None], list[Tensor]]:
    """Capture calls in a CUDA graph.

    Args:
        run: what is captured.
        warm: whether to call it once before, to set up what a first call sets up.

    Returns:
        What replays it, and the outputs that each replay writes.
    """
    if warm:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def _features(count: int, dtype: torch.dtype) -> list[Tensor]:
    return [_random(*SHAPE, dtype=dtype) for _ in range(count)]


def _parameters(count: int) -> list[Tensor]:
    return [_random(count), _random(1), _random()]


def _magnitudes(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.abs() for tensor in wide(tensors)]


def _flat(results: tuple[list[Tensor], Tensor, Tensor, Tensor]) -> list[Tensor]:
    return [*results[0], *results[1:]]


def predict(dtype: torch.dtype) -> Step:
    history, parameters = _features(8, dtype), _parameters(8)

    def expected() -> Expected:
        want = reference.predict(wide(history), *wide(parameters))
        return [(want, reference.predict(_magnitudes(history), *_magnitudes(parameters)))]

    return Step([*history, *parameters], lambda ops: [ops.predict(history, *parameters)], expected)


def predict_backward(dtype: torch.dtype) -> Step:
    (grad, *history), parameters = _features(5, dtype), _parameters(4)

    def expected() -> Expected:
        want = reference.predict_backward(grad.double(), wide(history), *wide(parameters), True)
        scale = reference.predict_backward(grad.double().abs(), _magnitudes(history), *_magnitudes(parameters), True)
        return list(zip(_flat(want), _flat(scale), strict=True))

    return Step(
        [grad, *history, *parameters],
        lambda ops: _flat(ops.predict_backward(grad, history, *parameters, True)),
        expected,
    )


def predict_l1(dtype: torch.dtype) -> Step:
    (target, *history), parameters = _features(9, dtype), _parameters(8)
    out = torch.empty_like(target)

    def expected() -> Expected:
        forecast = torch.empty(SHAPE, dtype=torch.float64, device=DEVICE)
        want = reference.predict_l1(wide(history), target.double(), *wide(parameters), forecast)
        # A sign that turns in float32 changes a gradient by two terms of size |h| / N.
        room = 1 + 8 / target.numel()
        scale = reference.predict(_magnitudes(history), *_magnitudes(parameters))
        return [*((value, value.abs() + room) for value in want), (forecast, scale)]

    return Step(
        [target, *history, *parameters],
        lambda ops: [*ops.predict_l1(history, target, *parameters, out), out],
        expected,
    )


def _rows(features: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> Expected:
    want = reference.forecast(wide(features), coefficients.double(), offsets.double())
    scale = reference.forecast(_magnitudes(features), coefficients.double().abs(), offsets.double().abs())
    return list(zip(want, scale, strict=True))


def forecast(dtype: torch.dtype) -> Step:
    history, coefficients, offsets = _features(8, dtype), _random(6, 8), _random(6)
    return Step(
        [*history, coefficients, offsets],
        lambda ops: ops.forecast(history, coefficients, offsets),
        lambda: _rows(history, coefficients, offsets),
    )


def forecast_into(dtype: torch.dtype) -> Step:
    ring, coefficients, offsets = _random(7, *SHAPE, dtype=dtype), _random(3, 4), _random(3)
    read, write = [6, 1, 1, 4], [0, 5, 3]

    def run(ops: Any) -> list[Tensor]:
        ops.forecast_into(ring, coefficients, offsets, read, write)
        return [ring[slot] for slot in write]

    return Step([ring, coefficients, offsets], run, lambda: _rows([ring[slot] for slot in read], coefficients, offsets))


def push(dtype: torch.dtype) -> Step:
    ring, feature = _random(3, *SHAPE, dtype=dtype), _random(*SHAPE)

    def run(ops: Any) -> list[Tensor]:
        ops.push(ring, feature, 1)
        return [ring[1]]

    def expected() -> Expected:
        return [(feature.to(dtype).double(), torch.zeros((), dtype=torch.float64, device=DEVICE))]

    return Step([feature], run, expected)


def gram(dtype: torch.dtype) -> Step:
    features = _features(9, dtype)

    def expected() -> Expected:
        return [(reference.gram(wide(features)), reference.gram(_magnitudes(features)))]

    return Step(features, lambda ops: [ops.gram(features)], expected)


def _kan(dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return x, the grid, and the weights: base, spline, scaler."""
    rows, inputs, outputs = KAN_SHAPE
    grid = (1.2 * torch.arange(-3, 9, device=DEVICE) - 3).expand(inputs, 12).contiguous()
    weights = [_random(outputs, inputs), _random(outputs, inputs, 8), _random(outputs, inputs)]
    return _random(rows, inputs, dtype=dtype), grid, weights


def _by_largest(wanted: Sequence[Tensor]) -> Expected:
    """Terms may be ten times as large as the largest of their sums."""
    return [(want, 10 * want.abs().max()) for want in wanted]


def kan_linear(dtype: torch.dtype) -> Step:
    x, grid, weights = _kan(dtype)
    return Step(
        [x, *weights],
        lambda ops: [ops.kan_linear(x, grid, *weights)],
        lambda: _by_largest([reference.kan_linear(*wide([x, grid, *weights]))]),
    )


def kan_linear_backward(dtype: torch.dtype) -> Step:
    x, grid, weights = _kan(dtype)
    grad = _random(KAN_SHAPE[0], KAN_SHAPE[2], dtype=dtype)
    return Step(
        [grad, x, *weights],
        lambda ops: list(ops.kan_linear_backward(grad, x, grid, *weights)),
        lambda: _by_largest(reference.kan_linear_backward(*wide([grad, x, grid, *weights]))),
    )


STEPS: dict[str, Callable[[torch.dtype], Step]] = {
    make.__name__: make
    for make in (
        predict,
        predict_backward,
        predict_l1,
        forecast,
        forecast_into,
        push,
        gram,
        kan_linear,
        kan_linear_backward,
    )
}

"""Makes calls of every op: inputs that can be drawn anew in place, and what the op must then return.

Tensors are made on torch's default device, which the caller sets (`with torch.device("cuda"):`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from lesa_kernels.ops import OPS, TOLERANCES, reference

Expected = list[tuple[Tensor, Tensor]]
"""Of each output the value and the scale of its error, both float64."""


@dataclass(frozen=True)
class Size:
    """Shapes of a call.

    Args:
        name: of the size.
        feature: shape of a feature.
        kan: rows, inputs and outputs of a layer.
    """

    name: str
    feature: tuple[int, ...]
    kan: tuple[int, int, int]


ODD = Size("odd", (3, 1031), (5, 7, 6))
ALIGNED = Size("aligned", (2, 96, 3072), (64, 51, 256))


@dataclass(frozen=True)
class Error:
    """How far an output lies from what it must be.

    Args:
        largest: the largest error.
        of_allowed: the largest error as a multiple of what the tolerance allows; at most 1 is right.
        first_bad: flat index of the first element that is wrong, None if there is none.
        nans: elements that are NaN where none must be.
    """

    largest: float
    of_allowed: float
    first_bad: int | None
    nans: int


def error_of(got: Tensor, want: Tensor, scale: Tensor) -> Error:
    """Compare an output with the reference.

    Args:
        got: what a kernel returned; the tolerance is that of its dtype. Kernels on GPUs add up in float32, whatever
            holds the result.
        want: float64, what it must be.
        scale: float64, the sum of the magnitudes of each element's terms, of a shape that broadcasts.
    """
    if got.numel() == 0:
        return Error(0.0, 0.0, None, 0)
    tolerance = TOLERANCES[torch.float32 if got.dtype == torch.float64 else got.dtype]
    error = (got.double() - want).abs().flatten()
    allowed = (tolerance.absolute + tolerance.relative * scale).expand_as(want).flatten()
    # A NaN compares false.
    bad = (~(error <= allowed)).nonzero().flatten()
    finite = error.nan_to_num(nan=torch.inf)
    of_allowed = torch.where(finite == 0, 0.0, finite / allowed.clamp(min=torch.finfo(torch.float64).tiny))
    return Error(
        finite.max().item(),
        of_allowed.max().item(),
        int(bad[0]) if bad.numel() else None,
        int((torch.isnan(got) & ~torch.isnan(want)).sum()),
    )


def first_wrong(errors: Sequence[Error]) -> str:
    """Say which output is the first that is wrong, where and by how much; empty if all are right."""
    for number, error in enumerate(errors):
        if error.first_bad is not None:
            return (
                f"output {number} is off by {error.largest:.3e}, {error.of_allowed:.3g} times what is allowed, "
                f"first at element {error.first_bad}; {error.nans} NaN"
            )
    return ""


@dataclass(frozen=True)
class Call:
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

    def errors(self, outputs: Sequence[Tensor]) -> list[Error]:
        """Compare outputs with the reference on the inputs as they are."""
        return [error_of(got, *wanted) for got, wanted in zip(outputs, self.expected(), strict=True)]

    def wrong(self, outputs: Sequence[Tensor]) -> str:
        """Say which output is wrong, where and by how much; empty if all are right."""
        return first_wrong(self.errors(outputs))


def namespaces() -> dict[str, Any]:
    """Return name -> namespace of ops: what the dispatcher serves, and Triton's kernels called directly."""
    return {"lesa": torch.ops.lesa, "triton": importlib.import_module("lesa_kernels.backends.triton")}


def capture(run: Callable[[], list[Tensor]], warm: bool = True) -> tuple[Callable[[], None], list[Tensor]]:
    """Capture calls in a CUDA graph.

    Args:
        run: what is captured.
        warm: whether to call it once before, on another stream, to set up what a first call sets up.

    Returns:
        What replays it, and the outputs that each replay writes.
    """
    if warm:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            outputs = run()
    except Exception:
        # torch leaves the stream of a failed capture the current one, and random numbers as if it went on.
        torch.cuda.set_stream(current)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device="cuda").add_(1)
        raise
    return graph.replay, outputs


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the same values in float64."""
    return [tensor.double() for tensor in tensors]


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype)


def _features(count: int, size: Size, dtype: torch.dtype) -> list[Tensor]:
    return [_random(*size.feature, dtype=dtype) for _ in range(count)]


def _parameters(count: int) -> list[Tensor]:
    return [_random(count), _random(1), _random()]


def _magnitudes(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.abs() for tensor in wide(tensors)]


def _flat(results: tuple[list[Tensor], Tensor, Tensor, Tensor]) -> list[Tensor]:
    return [*results[0], *results[1:]]


def predict(dtype: torch.dtype, size: Size) -> Call:
    """A forecast of 8 features."""
    history, parameters = _features(8, size, dtype), _parameters(8)

    def expected() -> Expected:
        want = reference.predict(wide(history), *wide(parameters))
        return [(want, reference.predict(_magnitudes(history), *_magnitudes(parameters)))]

    return Call([*history, *parameters], lambda ops: [ops.predict(history, *parameters)], expected)


def _all_gradients(grad: Tensor, history: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    weight, bias, gain = parameters
    return _flat(reference.predict_backward(grad, history, weight, bias, gain, True))


def predict_backward(dtype: torch.dtype, size: Size) -> Call:
    """All gradients of a forecast of 4 features."""
    (grad, *history), parameters = _features(5, size, dtype), _parameters(4)

    def expected() -> Expected:
        want = _all_gradients(grad.double(), wide(history), wide(parameters))
        scale = _all_gradients(grad.double().abs(), _magnitudes(history), _magnitudes(parameters))
        return list(zip(want, scale, strict=True))

    return Call(
        [grad, *history, *parameters],
        lambda ops: _flat(ops.predict_backward(grad, history, *parameters, True)),
        expected,
    )


def predict_l1(dtype: torch.dtype, size: Size) -> Call:
    """The loss of a forecast of 8 features, its gradients and the forecast."""
    (target, *history), parameters = _features(9, size, dtype), _parameters(8)
    out = torch.empty_like(target)

    def expected() -> Expected:
        forecast = torch.empty(size.feature, dtype=torch.float64, device=target.device)
        weight, bias, gain = wide(parameters)
        want = reference.predict_l1(wide(history), target.double(), weight, bias, gain, forecast)
        # A sign that turns in float32 changes a gradient by two terms of size |h| / N.
        room = 1 + 8 / target.numel()
        scale = reference.predict(_magnitudes(history), *_magnitudes(parameters))
        return [*((value, value.abs() + room) for value in want), (forecast, scale)]

    return Call(
        [target, *history, *parameters],
        lambda ops: [*ops.predict_l1(history, target, *parameters, out), out],
        expected,
    )


def _rows(features: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> Expected:
    want = reference.forecast(wide(features), coefficients.double(), offsets.double())
    scale = reference.forecast(_magnitudes(features), coefficients.double().abs(), offsets.double().abs())
    return list(zip(want, scale, strict=True))


def forecast(dtype: torch.dtype, size: Size) -> Call:
    """A segment: 6 forecasts of 8 features."""
    history, coefficients, offsets = _features(8, size, dtype), _random(6, 8), _random(6)
    return Call(
        [*history, coefficients, offsets],
        lambda ops: ops.forecast(history, coefficients, offsets),
        lambda: _rows(history, coefficients, offsets),
    )


def forecast_into(dtype: torch.dtype, size: Size) -> Call:
    """Three forecasts into a ring, of which one slot is read twice."""
    ring, coefficients, offsets = _random(7, *size.feature, dtype=dtype), _random(3, 4), _random(3)
    read, write = [6, 1, 1, 4], [0, 5, 3]

    def run(ops: Any) -> list[Tensor]:
        ops.forecast_into(ring, coefficients, offsets, read, write)
        return [ring[slot] for slot in write]

    return Call([ring, coefficients, offsets], run, lambda: _rows([ring[slot] for slot in read], coefficients, offsets))


def push(dtype: torch.dtype, size: Size) -> Call:
    """A float32 feature into a slot of a ring."""
    ring, feature = _random(3, *size.feature, dtype=dtype), _random(*size.feature)

    def run(ops: Any) -> list[Tensor]:
        ops.push(ring, feature, 1)
        return [ring[1]]

    def expected() -> Expected:
        want = feature.to(dtype).double()
        return [(want, torch.zeros_like(want))]

    return Call([feature], run, expected)


def gram(dtype: torch.dtype, size: Size) -> Call:
    """All products of 9 features."""
    features = _features(9, size, dtype)

    def expected() -> Expected:
        return [(reference.gram(wide(features)), reference.gram(_magnitudes(features)))]

    return Call(features, lambda ops: [ops.gram(features)], expected)


def _kan(dtype: torch.dtype, size: Size) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return x, the grid, and the weights: base, spline, scaler."""
    rows, inputs, outputs = size.kan
    grid = (1.2 * torch.arange(-3, 9) - 3).expand(inputs, 12).contiguous()
    weights = [_random(outputs, inputs), _random(outputs, inputs, 8), _random(outputs, inputs)]
    return _random(rows, inputs, dtype=dtype), grid, weights


def _by_largest(wanted: Sequence[Tensor]) -> Expected:
    """Terms may be ten times as large as the largest of their sums."""
    return [(want, 10 * want.abs().max()) for want in wanted]


def kan_linear(dtype: torch.dtype, size: Size) -> Call:
    """A layer of a KAN."""
    x, grid, weights = _kan(dtype, size)
    return Call(
        [x, *weights],
        lambda ops: [ops.kan_linear(x, grid, *weights)],
        lambda: _by_largest([reference.kan_linear(*wide([x, grid, *weights]))]),
    )


def kan_linear_backward(dtype: torch.dtype, size: Size) -> Call:
    """All gradients of a layer of a KAN."""
    x, grid, weights = _kan(dtype, size)
    grad = _random(size.kan[0], size.kan[2], dtype=dtype)
    return Call(
        [grad, x, *weights],
        lambda ops: list(ops.kan_linear_backward(grad, x, grid, *weights)),
        lambda: _by_largest(reference.kan_linear_backward(*wide([grad, x, grid, *weights]))),
    )


def _example(name: str, dtype: torch.dtype, size: Size) -> Call:
    """The example of an op, for those whose results are as large as what they add up."""
    arguments = OPS[name].example(lambda *shape: _random(*shape, dtype=dtype), size.feature)
    values, tree = tree_flatten(arguments)
    tensors = [value for value in values if isinstance(value, Tensor)]

    def results(of: Callable[..., Any], wanted: Sequence[Any]) -> list[Tensor]:
        return list(tree_flatten(of(*tree_unflatten(wanted, tree)))[0])

    def expected() -> Expected:
        exact = [value.double() if isinstance(value, Tensor) else value for value in values]
        return [(want, want.abs()) for want in results(OPS[name].reference, exact)]

    return Call(tensors, lambda ops: results(getattr(ops, name), values), expected)


_SPECIAL = (
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
CALLS: dict[str, Callable[[torch.dtype, Size], Call]] = {
    **{name: partial(_example, name) for name in OPS},
    **{make.__name__: make for make in _SPECIAL},
}
"""Name of an op -> what makes a call of it."""

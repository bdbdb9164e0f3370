"""The kernels of kan_linear and its backward against float64; engines.py says how they run here."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from arrays import DTYPES, Array, close, contiguous, encode, random, tensor_of
from engines import Engine, Result, Values

from lesa_kernels.ops import TOLERANCES, reference
from lesa_kernels.ops.kan import spline_bases, spline_order, spline_slopes


class Layer(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("parameters", Values * 4),
        ("rows", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("bases", ctypes.c_int),
        ("order", ctypes.c_int),
    )


class Gradients(ctypes.Structure):
    _fields_ = (("x", ctypes.c_void_p), ("base", Result), ("spline", Result), ("scaler", Result))


@dataclass
class Problem:
    """A layer and its input: x [N, I], grid [I, knots], base and scaler [O, I], spline [O, I, B]."""

    x: Array
    grid: Array
    base: Array
    spline: Array
    scaler: Array

    @property
    def parameters(self) -> tuple[Array, Array, Array, Array]:
        return self.grid, self.base, self.spline, self.scaler

    @property
    def tensors(self) -> list[torch.Tensor]:
        """x and the parameters in float64."""
        return [tensor_of(array) for array in (self.x, *self.parameters)]

    @property
    def order(self) -> int:
        return int(self.grid.shape[1] - self.spline.shape[2] - 1)


Grid = Callable[[int, int, np.random.Generator], np.ndarray]


def uniform(inputs: int, knots: int, rng: np.random.Generator) -> np.ndarray:
    """As LESA's: steps of 1.2, the same for every input."""
    return np.tile(1.2 * (np.arange(knots) - (knots - 1) / 2), (inputs, 1))


def uneven(inputs: int, knots: int, rng: np.random.Generator) -> np.ndarray:
    return np.cumsum(rng.uniform(0.2, 2, (inputs, knots)), axis=1) - knots / 2


def problem(
    rows: int,
    inputs: int,
    outputs: int,
    *,
    dtype: str = "float32",
    bases: int = 8,
    order: int = 3,
    grid: Grid = uniform,
    parameter_dtypes: Sequence[str] = ("float32",) * 4,
) -> Problem:
    rng = np.random.default_rng(0)
    knots = bases + order + 1
    shapes = ((outputs, inputs), (outputs, inputs, bases), (outputs, inputs))
    arrays = [random(shape, kind, rng) for shape, kind in zip(shapes, parameter_dtypes[1:], strict=True)]
    placed = contiguous((inputs, knots), parameter_dtypes[0])
    placed.view[...] = encode(grid(inputs, knots, rng), parameter_dtypes[0])
    x = contiguous((rows, inputs), dtype)
    x.view[...] = encode(3 * rng.standard_normal((rows, inputs)), dtype)
    return Problem(x, placed, *arrays)


def layer_of(engine: Engine, case: Problem) -> Layer:
    flat = [Values(engine.pointer(array), 0, 1, array.dtype == "float32") for array in case.parameters]
    outputs, inputs, bases = case.spline.shape
    rows = case.x.shape[0]
    return Layer(engine.pointer(case.x), (Values * 4)(*flat), rows, inputs, outputs, bases, case.order)


def forward(engine: Engine, case: Problem) -> Array:
    out = contiguous((case.x.shape[0], case.base.shape[0]), case.x.dtype)
    engine.call("run_kan_forward", case.x.dtype, ctypes.byref(layer_of(engine, case)), engine.pointer(out))
    return out


def backward(engine: Engine, case: Problem, grad: Array) -> list[Array]:
    """The gradients of x, base, spline and scaler."""
    results = [contiguous(array.shape, array.dtype) for array in (case.x, *case.parameters[1:])]
    pointers = [Result(engine.pointer(result), result.dtype == "float32") for result in results]
    gradients = Gradients(pointers[0].data, *pointers[1:])
    layer = layer_of(engine, case)
    engine.call("run_kan_backward", case.x.dtype, ctypes.byref(layer), engine.pointer(grad), ctypes.byref(gradients))
    return results


def check_forward(engine: Engine, case: Problem) -> Array:
    """Compare with the definition in float64."""
    out = forward(engine, case)
    x, grid, base, spline, scaler = case.tensors
    want = reference.kan_linear(x, grid, base, spline, scaler)
    bases = spline_bases(x, grid, case.order)
    scale = torch.nn.functional.silu(x).abs() @ base.abs().T
    scale += torch.einsum("nib,oib->no", bases.abs(), (spline * scaler.unsqueeze(-1)).abs())
    assert close(out, want, scale, TOLERANCES[getattr(torch, case.x.dtype)])
    return out


def check_backward(engine: Engine, case: Problem) -> list[Array]:
    """Compare all four gradients with the definition in float64."""
    grad = random((case.x.shape[0], case.base.shape[0]), case.x.dtype, np.random.default_rng(1))
    results = backward(engine, case, grad)
    x, grid, base, spline, scaler = case.tensors
    g = tensor_of(grad)
    wanted = reference.kan_linear_backward(g, x, grid, base, spline, scaler)
    for result, want, scale in zip(results, wanted, magnitudes(g, x, grid, base, spline, scaler), strict=True):
        assert close(result, want, scale, TOLERANCES[getattr(torch, result.dtype)])
    return results


def magnitudes(
    g: torch.Tensor, x: torch.Tensor, grid: torch.Tensor, base: torch.Tensor, spline: torch.Tensor, scaler: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Sums of the magnitudes of the terms of the four gradients."""
    order = spline_order(grid, spline)
    bases, slopes = spline_bases(x, grid, order), spline_slopes(x, grid, order).abs()
    g, base, spline, scaler = g.abs(), base.abs(), spline.abs(), scaler.abs()
    sigmoid = torch.sigmoid(x)
    through = torch.einsum("no,oib->nib", g, spline * scaler.unsqueeze(-1))
    grad_scaled = torch.einsum("no,nib->oib", g, bases)
    return (
        (g @ base) * (sigmoid * (1 + x.abs())) + (through * slopes).sum(-1),
        g.T @ (x * sigmoid).abs(),
        grad_scaled * scaler.unsqueeze(-1),
        (grad_scaled * spline).sum(-1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (1, 51, 9), (5, 7, 17), (9, 33, 1)])
def test_odd_sizes(engine: Engine, dtype: str, rows: int, inputs: int, outputs: int) -> None:
    case = problem(rows, inputs, outputs, dtype=dtype)
    check_forward(engine, case)
    check_backward(engine, case)


@pytest.mark.parametrize("grid", [uniform, uneven])
@pytest.mark.parametrize(("order", "bases"), [(0, 5), (1, 1), (2, 6), (3, 1), (3, 8), (4, 7), (8, 3)])
def test_orders_and_grids(engine: Engine, grid: Grid, order: int, bases: int) -> None:
    case = problem(3, 6, 5, order=order, bases=bases, grid=grid)
    check_forward(engine, case)
    check_backward(engine, case)


def test_more_inputs_than_threads(engine: Engine) -> None:
    check_forward(engine, problem(2, 300, 9))
    check_backward(engine, problem(2, 40, 70))


@pytest.mark.parametrize(("rows", "inputs", "bases"), [(19, 30, 8), (37, 3, 8), (9, 130, 1), (33, 2, 200)])
def test_more_rows_than_a_block_holds(engine: Engine, rows: int, inputs: int, bases: int) -> None:
    """Gradients of weights: as many rows at a time as 512 pairs with the inputs of a block allow, at most 32."""
    check_backward(engine, problem(rows, inputs, 3, bases=bases))


@pytest.mark.exhaustive
@pytest.mark.parametrize(("inputs", "outputs"), [(51, 256), (256, 256), (256, 1)])
def test_the_layers_of_lesa(engine: Engine, inputs: int, outputs: int) -> None:
    case = problem(5, inputs, outputs)
    check_forward(engine, case)
    check_backward(engine, case)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("own", [(True, False, False, True), (False, True, True, False), (True, True, True, True)])
def test_each_parameter_has_its_own_dtype(engine: Engine, dtype: str, own: tuple[bool, ...]) -> None:
    kinds = [dtype if flag else "float32" for flag in own]
    case = problem(2, 10, 9, dtype=dtype, parameter_dtypes=kinds)
    check_forward(engine, case)
    check_backward(engine, case)


@pytest.mark.parametrize("grid", [uniform, uneven])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_intervals_are_half_open(engine: Engine, grid: Grid, order: int) -> None:
    """x on every knot, a hair below and above it: on the last knot and beyond, all bases are zero."""
    case = problem(1, 1, 3, order=order, grid=grid)
    knots = case.grid.view[0]
    points = np.concatenate([knots, np.nextafter(knots, -np.inf), np.nextafter(knots, np.inf)]).astype(np.float32)
    case.x = contiguous((len(points), 1), "float32")
    case.x.view[:, 0] = points
    check_forward(engine, case)
    if order > 1:  # the slope of a line jumps at a knot, where float32 and float64 may stand on either side
        check_backward(engine, case)


def test_far_from_the_knots_only_silu_is_left(engine: Engine) -> None:
    case = problem(4, 1, 3)
    case.x.view[:, 0] = [-90, -7, 7, 1e30]
    out = check_forward(engine, case)
    assert np.isfinite(out.values).all()


def kinds(values: Any) -> list[str]:
    """Finite, NaN or an infinity, of each value."""
    return ["finite" if np.isfinite(value) else str(value) for value in np.ravel(values)]


@pytest.mark.parametrize("order", [0, 1, 3, 4])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_goes_where_the_definition_lets_it(engine: Engine, value: float, order: int) -> None:
    """Bases of infinity are not numbers by the recursion; of order 0, which only compares, they are zero."""
    case = problem(2, 5, 3, order=order)
    case.x.view[1, 2] = value
    assert kinds(forward(engine, case).values) == kinds(reference.kan_linear(*case.tensors))
    grad = random((2, 3), "float32", np.random.default_rng(1))
    wanted = reference.kan_linear_backward(tensor_of(grad), *case.tensors)
    for result, want in zip(backward(engine, case, grad), wanted, strict=True):
        assert kinds(result.values) == kinds(want)


@pytest.mark.parametrize("grid", [uniform, uneven])
@pytest.mark.parametrize(("order", "bases"), [(0, 4), (1, 5), (3, 1), (3, 8), (6, 4)])
def test_each_basis_and_each_slope_alone(engine: Engine, grid: Grid, order: int, bases: int) -> None:
    """Output b is basis b where the base weights are zero and the spline weights the identity."""
    case = problem(1, 1, bases, order=order, bases=bases, grid=grid)
    case.base.view[...] = 0
    case.spline.view[...] = np.eye(bases)[:, None]
    case.scaler.view[...] = 1
    knots = case.grid.view[0]
    points = np.linspace(knots[0] - 1, knots[-1] + 1, 23)[:, None].astype(np.float32)
    case.x = contiguous(points.shape, "float32")
    case.x.view[...] = points
    x, placed, *_ = case.tensors
    tolerance = TOLERANCES[torch.float32]
    assert close(forward(engine, case), spline_bases(x, placed, order)[:, 0], 1, tolerance)
    case.x = contiguous((len(points) * bases, 1), "float32")
    case.x.view[...] = np.repeat(points, bases, axis=0)
    grad = contiguous((len(points) * bases, bases), "float32")
    grad.view[...] = np.tile(np.eye(bases), (len(points), 1))
    slopes = spline_slopes(x, placed, order).reshape(-1, 1)
    assert close(backward(engine, case, grad)[0], slopes, 1 + slopes.abs(), tolerance)


def without(case: Problem, *, rows: bool = False, inputs: bool = False, outputs: bool = False) -> Problem:
    """The problem with no rows, no inputs or no outputs: their arrays are empty."""
    n, i = case.x.shape
    o, _, b = case.spline.shape
    n, i, o = n * (not rows), i * (not inputs), o * (not outputs)
    shapes = ((n, i), (i, case.grid.shape[1]), (o, i), (o, i, b), (o, i))
    arrays = (case.x, *case.parameters)
    return Problem(
        *(
            Array(array.storage, 0, shape, array.strides, array.dtype)
            for array, shape in zip(arrays, shapes, strict=True)
        )
    )


@pytest.mark.parametrize(
    ("missing", "forward_launches", "backward_launches"),
    [("rows", [], ["weights"]), ("inputs", ["forward"], []), ("outputs", [], ["inputs"])],
)
def test_a_layer_without_rows_inputs_or_outputs(
    engine: Engine, missing: str, forward_launches: list[str], backward_launches: list[str]
) -> None:
    """No kernel is launched on an empty grid, which CUDA refuses."""
    case = without(problem(3, 5, 4), **{missing: True})
    check_forward(engine, case)
    engine.check_launches(*forward_launches)
    check_backward(engine, case)
    engine.check_launches(*backward_launches)


def test_the_same_input_gives_the_same_bits(engine: Engine) -> None:
    case = problem(5, 20, 20, dtype="bfloat16")
    first, second = check_backward(engine, case), check_backward(engine, case)
    assert all((a.storage == b.storage).all() for a, b in zip(first, second, strict=True))

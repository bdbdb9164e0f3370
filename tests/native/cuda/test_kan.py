"""The kernels of kan_linear and its backward against float64; engines.py says how they run here."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from arrays import DTYPES, Array, close, contiguous, encode, random, tensor_of
from engines import Engine, Result, Values

from lesa_kernels import reference
from lesa_kernels.reference import TOLERANCES


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


def check_forward(engine: Engine, case: Problem) -> Array:
    """Compare with the definition in float64."""
    out = contiguous((case.x.shape[0], case.base.shape[0]), case.x.dtype)
    engine.call("run_kan_forward", case.x.dtype, ctypes.byref(layer_of(engine, case)), engine.pointer(out))
    x, grid, base, spline, scaler = case.tensors
    want = reference.kan_linear(x, grid, base, spline, scaler)
    bases = reference.spline_bases(x, grid, case.order)
    scale = torch.nn.functional.silu(x).abs() @ base.abs().T
    scale += torch.einsum("nib,oib->no", bases.abs(), (spline * scaler.unsqueeze(-1)).abs())
    # What x is to a knot in float32 costs a few roundings in each of the order's factors.
    tolerance = TOLERANCES[getattr(torch, case.x.dtype)]
    assert close(out, want, 4 * scale + 1e-3, tolerance)
    return out


def check_backward(engine: Engine, case: Problem) -> list[Array]:
    """Compare all four gradients with the definition in float64."""
    grad = random((case.x.shape[0], case.base.shape[0]), case.x.dtype, np.random.default_rng(1))
    results = [contiguous(array.shape, array.dtype) for array in (case.x, *case.parameters[1:])]
    pointers = [Result(engine.pointer(result), result.dtype == "float32") for result in results]
    gradients = Gradients(pointers[0].data, *pointers[1:])
    engine.call(
        "run_kan_backward",
        case.x.dtype,
        ctypes.byref(layer_of(engine, case)),
        engine.pointer(grad),
        ctypes.byref(gradients),
    )
    x, grid, base, spline, scaler = case.tensors
    g = tensor_of(grad)
    wanted = reference.kan_linear_backward(g, x, grid, base, spline, scaler)
    for result, want, scale in zip(results, wanted, magnitudes(g, x, grid, base, spline, scaler), strict=True):
        assert close(result, want, 8 * scale + 1e-3, TOLERANCES[getattr(torch, result.dtype)])
    return results


def magnitudes(
    g: torch.Tensor, x: torch.Tensor, grid: torch.Tensor, base: torch.Tensor, spline: torch.Tensor, scaler: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Sums of the magnitudes of the terms of the four gradients."""
    order = reference.spline_order(grid, spline)
    bases, slopes = reference.spline_bases(x, grid, order), reference.spline_slopes(x, grid, order).abs()
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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(engine: Engine, value: float) -> None:
    """Bases of infinity are not numbers, by the recursion."""
    case = problem(2, 5, 3)
    case.x.view[1, 2] = value
    out = contiguous((2, 3), "float32")
    engine.call("run_kan_forward", "float32", ctypes.byref(layer_of(engine, case)), engine.pointer(out))
    want = reference.kan_linear(*case.tensors)
    assert (np.isnan(out.values) == np.isnan(want.numpy())).all() and np.isnan(out.values[1]).all()


def test_no_rows_give_zero_gradients(engine: Engine) -> None:
    case = problem(1, 5, 3)
    case.x = Array(case.x.storage, 0, (0, 5), (5, 1), "float32")
    results = [contiguous(array.shape, array.dtype) for array in case.parameters[1:]]
    pointers = [Result(engine.pointer(result), True) for result in results]
    layer, gradients = layer_of(engine, case), Gradients(None, *pointers)
    engine.call("run_kan_backward", "float32", ctypes.byref(layer), None, ctypes.byref(gradients))
    assert all((result.values == 0).all() for result in results)


def test_the_same_input_gives_the_same_bits(engine: Engine) -> None:
    case = problem(5, 20, 20, dtype="bfloat16")
    first, second = check_backward(engine, case), check_backward(engine, case)
    assert all((a.storage == b.storage).all() for a, b in zip(first, second, strict=True))

"""The kernels of predict_backward and predict_l1 against float64; engines.py says how they run here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from arrays import (
    DTYPES,
    Array,
    Layout,
    close,
    contiguous,
    encode,
    filled,
    line,
    misaligned,
    padded,
    random,
    sparse,
    tensor_of,
    transposed,
)
from engines import Engine, Result, Values, integers

from lesa_kernels.ops import TOLERANCES, reference


class Gradients(ctypes.Structure):
    _fields_ = (
        ("weight", Result),
        ("bias", Result),
        ("gain", Result),
        ("loss", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
    )


@dataclass
class Problem:
    """The tensors of one reduction; `other` is the gradient of the forecast or the target of a loss."""

    history: Sequence[Array]
    other: Array
    weight: Array
    bias: Array
    gain: Array
    out: Array | None = None

    @property
    def parameters(self) -> tuple[Array, Array, Array]:
        return self.weight, self.bias, self.gain


@dataclass
class Outcome:
    """What the kernels wrote."""

    weight: Array
    bias: Array
    gain: Array
    loss: Array
    factors: Array


def problem(
    dtype: str,
    shape: tuple[int, ...],
    layout: Layout,
    history: int,
    out: Layout | None = None,
    parameter_dtypes: Sequence[str] = ("float32", "float32", "float32"),
) -> Problem:
    rng = np.random.default_rng(0)
    features = [filled(layout(shape, dtype), rng) for _ in range(history)]
    shapes = ((1, history), (1, 1), (1, 1))
    parameters = [random(size, kind, rng) for size, kind in zip(shapes, parameter_dtypes, strict=True)]
    return Problem(features, filled(layout(shape, dtype), rng), *parameters, out(shape, dtype) if out else None)


def reduce(engine: Engine, case: Problem, is_loss: bool) -> Outcome:
    results = [contiguous(parameter.shape, parameter.dtype) for parameter in case.parameters]
    loss, factors = contiguous((1,), "float32"), contiguous((len(case.history) + 1,), "float32")
    workspace = contiguous((engine.number("workspace_of_reduce", len(case.history)),), "float64")
    gradients = Gradients(
        *(Result(engine.pointer(result), result.dtype == "float32") for result in results),
        engine.pointer(loss if is_loss else None),
        engine.pointer(None if is_loss else factors),
    )
    tensors = [*case.history, case.other, *([case.out] if case.out else [])]
    sizes, values = integers(case.other.shape), (Values * 3)(*map(engine.values, case.parameters))
    counts = (len(case.other.shape), sizes, len(case.history), len(tensors))
    engine.call(
        "run_reduce",
        case.other.dtype,
        *counts,
        engine.views(tensors),
        values,
        engine.pointer(workspace),
        ctypes.byref(gradients),
    )
    return Outcome(*results, loss, factors)


def check_backward(engine: Engine, case: Problem) -> Outcome:
    """Compare with predict_backward's definition in float64."""
    got = reduce(engine, case, is_loss=False)
    history, (weight, bias, gain) = list(map(tensor_of, case.history)), map(tensor_of, case.parameters)
    arguments = (tensor_of(case.other), *history, weight.reshape(-1), bias, gain)
    want, scale = (
        reference.predict_backward(change[0], change[1:-3], *change[-3:], False)[1:]
        for change in (arguments, tuple(map(torch.abs, arguments)))
    )
    for k, array in enumerate((got.weight, got.bias, got.gain)):
        tolerance = TOLERANCES[getattr(torch, array.dtype)]
        assert close(array, want[k].reshape(array.shape), scale[k].reshape(array.shape), tolerance)
    factors = gain.item() * weight.reshape(-1).numpy()
    factors[-1] += 1
    assert np.abs(got.factors.values - [*factors, 0]).max() <= 1e-6
    return got


def check_loss(engine: Engine, case: Problem) -> Outcome:
    """Compare with predict_l1's definition in float64."""
    got = reduce(engine, case, is_loss=True)
    history, (weight, bias, gain) = list(map(tensor_of, case.history)), map(tensor_of, case.parameters)
    out = torch.empty(case.other.shape, dtype=torch.float64)
    loss, *want = reference.predict_l1(history, tensor_of(case.other), weight.reshape(-1), bias, gain, out)
    assert close(got.loss, loss, loss, TOLERANCES[torch.float32])
    # Errors near zero may change their sign in float32; the cases are too small for one to lie that near.
    largest = max(feature.abs().max().item() for feature in history)
    for array, gradient in zip((got.weight, got.bias, got.gain), want, strict=True):
        scale = (1 + abs(gain.item())) * (1 + weight.abs().sum().item()) * largest
        assert close(array, gradient.reshape(array.shape), scale, TOLERANCES[getattr(torch, array.dtype)])
    if case.out is not None:
        magnitudes = [tensor.abs() for tensor in (*history, weight.reshape(-1), bias, gain)]
        scale = reference.predict(magnitudes[:-3], *magnitudes[-3:])
        assert close(case.out, out, scale, TOLERANCES[getattr(torch, case.other.dtype)])
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 255, 1000, 8803])
def test_odd_sizes(engine: Engine, dtype: str, size: int) -> None:
    check_backward(engine, problem(dtype, (size,), contiguous, history=4))
    check_loss(engine, problem(dtype, (size,), contiguous, history=4, out=contiguous))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("history", [1, 3, 8, 9, 16, 17, 32, 33, 64])
def test_history_lengths(engine: Engine, dtype: str, history: int) -> None:
    check_backward(engine, problem(dtype, (264,), contiguous, history))
    check_loss(engine, problem(dtype, (264,), contiguous, history, out=contiguous))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [misaligned, padded, transposed, sparse])
@pytest.mark.parametrize("history", [4, 20])
def test_any_strides_and_offsets(engine: Engine, dtype: str, layout: Layout, history: int) -> None:
    check_backward(engine, problem(dtype, (5, 16), layout, history))
    check_loss(engine, problem(dtype, (5, 16), layout, history, out=layout))
    check_loss(engine, problem(dtype, (5, 16), contiguous, history, out=layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [9, 587])
@pytest.mark.parametrize(
    ("offsets", "width"), [((1, 5, 9), 4), ((0, 2, 8), 2), ((3, 2, 1), 1), ((4,) * 13, 4), ((*range(13),), 1)]
)
def test_offsets_of_each_its_own(engine: Engine, dtype: str, size: int, offsets: tuple[int, ...], width: int) -> None:
    """Of the history's features and of what is compared with them, which is written as well."""
    case = problem(dtype, (size,), contiguous, len(offsets) - 1)
    lines = [filled(line(size, offset, dtype), np.random.default_rng(k)) for k, offset in enumerate(offsets)]
    case.history, case.other = lines[:-1], lines[-1]
    check_backward(engine, case)
    case.out = line(size, offsets[0], dtype)
    check_loss(engine, case)
    assert case.out.untouched() == offsets[0]
    inputs = {3: 4 if (dtype, width) == ("float32", 4) else 8, 13: 16 if width == 4 else 64}[len(offsets)]
    kernels = [kernel for kernel in engine.launches if f"Li{inputs}ELi{width}ELb0E" in kernel]
    assert size == 9 or kernels or not engine.launches


def test_more_dimensions_than_a_kernel_walks(engine: Engine) -> None:
    """Each block adds to what it wrote in the launch before."""
    case = problem("float16", (2, 2, 3, 2, 2, 3), sparse, history=2, out=sparse)
    check_loss(engine, case)
    engine.check_launches(*["reduce"] * 4, "gradient")
    check_backward(engine, case)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("own", [(True, False, False), (False, True, True), (True, True, True)])
def test_each_parameter_has_its_own_dtype(engine: Engine, dtype: str, own: tuple[bool, bool, bool]) -> None:
    dtypes = [dtype if flag else "float32" for flag in own]
    case = problem(dtype, (72,), contiguous, history=4, parameter_dtypes=dtypes)
    check_backward(engine, case)
    check_loss(engine, case)


@pytest.mark.parametrize(
    ("layout", "history", "shape", "kernels"),
    [
        (contiguous, 3, (1000,), ["Li4ELi8ELb0E"]),
        (contiguous, 8, (1001,), ["Li8ELi8ELb0E", "Li8ELi1ELb0E"]),
        (contiguous, 9, (64,), ["Li16ELi4ELb0E"]),
        (contiguous, 32, (64,), ["Li32ELi2ELb0E"]),
        (contiguous, 33, (64,), ["Li64ELi1ELb0E"]),
        (padded, 4, (5, 16), ["Li8ELi8ELb1E"]),
        (misaligned, 4, (1000,), ["Li8ELi1ELb0E", "Li4ELi8ELb0E", "Li8ELi1ELb0E"]),
    ],
)
def test_which_kernel_runs(
    engine: Engine, layout: Layout, history: int, shape: tuple[int, ...], kernels: list[str]
) -> None:
    """Template arguments in the name: inputs, elements of a vector, strided or not."""
    case = problem("bfloat16", shape, layout, history)
    check_loss(engine, case)
    engine.check_launches(*kernels, "gradient")
    check_backward(engine, case)
    engine.check_launches(*kernels, "gradient")


def test_the_same_input_gives_the_same_bits(engine: Engine) -> None:
    case = problem("bfloat16", (8803,), contiguous, history=8)
    first, second = (reduce(engine, case, is_loss=False) for _ in range(2))
    for name in ("weight", "bias", "gain"):
        assert (getattr(first, name).storage == getattr(second, name).storage).all()


def test_a_forecast_that_is_exact_has_no_slope(engine: Engine) -> None:
    case = problem("float32", (40,), contiguous, history=2)
    case.gain.view[...] = 0
    case.other.view[...] = case.history[1].view
    got = reduce(engine, case, is_loss=True)
    assert got.loss.values.item() == 0
    assert not got.weight.values.any() and got.bias.values.item() == got.gain.values.item() == 0


@pytest.mark.parametrize("where", ["history", "target"])
def test_a_nan_reaches_the_loss_and_the_gradients(engine: Engine, where: str) -> None:
    case = problem("bfloat16", (40,), contiguous, history=3)
    (case.history[1] if where == "history" else case.other).view[17] = encode(np.array(np.nan), "bfloat16")
    got = reduce(engine, case, is_loss=True)
    for array in (got.loss, got.weight, got.bias, got.gain):
        assert np.isnan(array.values).all()


def test_no_elements_give_zeros(engine: Engine) -> None:
    case = problem("float32", (1,), contiguous, history=2)
    case.history = [Array(feature.storage, 0, (0, 4), (4, 1), "float32") for feature in case.history]
    case.other = Array(case.other.storage, 0, (0, 4), (4, 1), "float32")
    got = reduce(engine, case, is_loss=True)
    engine.check_launches("gradient")
    for array in (got.loss, got.weight, got.bias, got.gain):
        assert (array.values == 0).all()


def test_long_sums_keep_their_precision(engine: Engine) -> None:
    """Terms of one sign, 64 vectors a thread: what float32 loses stays within its tolerance."""
    case = problem("float32", (2 * 256 * 64 * 4,), contiguous, history=1)
    case.history[0].view[...] = np.abs(case.history[0].view) + 0.1
    case.other.view[...] = 0.7
    check_backward(engine, case)

"""The kernel of forecast_norm against float64; engines.py says how it runs here."""

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
    misaligned,
    padded,
    place,
    sparse,
    tensor_of,
    transposed,
)
from engines import Engine, Rows, Values

from lesa_kernels import reference
from lesa_kernels.reference import TOLERANCES

EPS = 1e-6


@dataclass
class Problem:
    """A ring [slots, batch, tokens, channels], what is read of it and written to it, and the parameters."""

    ring: Array
    read: Sequence[int]
    write: Sequence[int]
    coefficients: Array
    offsets: Array
    scale: Array
    shift: Array

    @property
    def parameters(self) -> tuple[Array, ...]:
        return self.coefficients, self.offsets, self.scale, self.shift


def problem(
    dtype: str,
    shape: tuple[int, int, int],
    read: Sequence[int] = (1, 0, 2),
    write: Sequence[int] = (),
    ring: Layout = contiguous,
    modulation: Layout = contiguous,
    parameter_dtypes: Sequence[str] = ("float32",) * 4,
) -> Problem:
    rng = np.random.default_rng(0)
    batch, _, channels = shape
    sizes = ((1, len(read)), (1, 1), (batch, channels), (batch, channels))
    layouts = (contiguous, contiguous, modulation, modulation)
    parameters = [
        filled(layout(size, kind), rng) for layout, size, kind in zip(layouts, sizes, parameter_dtypes, strict=True)
    ]
    return Problem(filled(ring((4, *shape), dtype), rng), read, write, *parameters)


def slot(ring: Array, index: int) -> Array:
    return Array(ring.storage, ring.offset + index * ring.strides[0], ring.shape[1:], ring.strides[1:], ring.dtype)


def normalize(engine: Engine, case: Problem) -> Array:
    """Run the kernel; the result is poison before."""
    _, batch, tokens, channels = case.ring.shape
    out = contiguous((batch, tokens, channels), case.ring.dtype)
    inputs = (ctypes.c_void_p * len(case.read))(*(engine.pointer(slot(case.ring, k)) for k in case.read))
    kept = engine.pointer(slot(case.ring, case.write[0]) if case.write else None)
    values = (Values * 4)(*map(engine.values, case.parameters))
    rows, tokens_each = ctypes.byref(Rows(batch * tokens, channels)), ctypes.c_int64(tokens)
    tensors = (inputs, kept, engine.pointer(out))
    engine.call(
        "run_normalize", case.ring.dtype, rows, tokens_each, len(case.read), *tensors, values, ctypes.c_float(EPS)
    )
    return out


def check(engine: Engine, case: Problem) -> Array:
    """Compare with the reference in float64; slots that are not written keep their bits."""
    before = np.array(case.ring.view)
    ring, coefficients, offsets, scale, shift = map(tensor_of, (case.ring, *case.parameters))
    history, offsets = [ring[k].clone() for k in case.read], offsets[0]
    [feature] = reference.forecast(history, coefficients, offsets)
    [magnitudes] = reference.forecast([h.abs() for h in history], coefficients.abs(), offsets.abs())
    want = reference.forecast_norm(ring, coefficients, offsets, case.read, case.write, scale, shift, EPS)
    got = normalize(engine, case)
    tolerance = TOLERANCES[getattr(torch, case.ring.dtype)]
    for k in range(len(before)):
        if k in case.write:
            assert close(slot(case.ring, k), feature, magnitudes, tolerance)
        else:
            assert slot(case.ring, k).view.tobytes() == before[k].tobytes()
    # An error in any channel moves the mean and the deviation, and with them the whole row.
    deviation = (feature.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    normed = (feature - feature.mean(-1, keepdim=True)) / deviation
    sums = magnitudes.amax(-1, keepdim=True) / deviation * (1 + normed.abs()) * (1 + scale.abs()).unsqueeze(1)
    share = TOLERANCES[torch.float32].relative / tolerance.relative
    assert close(got, want, want.abs() + share * (sums + shift.abs().unsqueeze(1)), tolerance)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 8, 90, 512, 520, 1000])
def test_lengths_of_rows(engine: Engine, dtype: str, channels: int) -> None:
    check(engine, problem(dtype, (2, 3, channels)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3072, 4096, 4104, 9000])
def test_long_rows(engine: Engine, dtype: str, channels: int) -> None:
    """Held in registers, at the limit, and computed three times."""
    check(engine, problem(dtype, (1, 1, channels), write=[0]))


@pytest.mark.parametrize("channels", [513, 1025])
def test_long_rows_of_a_warp(engine: Engine, channels: int) -> None:
    check(engine, problem("bfloat16", (1, 2, channels), write=[0]))


@pytest.mark.parametrize(("channels", "tokens"), [(40, 19), (15, 19), (1024, 5)])
def test_teams_loop_over_many_rows(engine: Engine, channels: int, tokens: int) -> None:
    """Two blocks of eight warps, or of one row each."""
    check(engine, problem("bfloat16", (2, tokens, channels), write=[3]))
    engine.check_launches("norm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 4, 5, 8, 64])
@pytest.mark.parametrize("channels", [24, 25, pytest.param(600, marks=pytest.mark.exhaustive)])
def test_numbers_of_inputs(engine: Engine, dtype: str, count: int, channels: int) -> None:
    check(engine, problem(dtype, (1, 2, channels), read=[k % 3 for k in range(count)]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 63, 1032, 4104])
@pytest.mark.parametrize("write", [0, 2, 3])
def test_the_forecast_may_take_the_place_of_an_input(engine: Engine, dtype: str, channels: int, write: int) -> None:
    check(engine, problem(dtype, (2, 2, channels), read=[1, 0, 2, 1], write=[write]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("modulation", [misaligned, padded, transposed, sparse])
@pytest.mark.parametrize("channels", [48, 600])
def test_any_strides_of_scale_and_shift(engine: Engine, dtype: str, modulation: Layout, channels: int) -> None:
    check(engine, problem(dtype, (3, 2, channels), modulation=modulation))


@pytest.mark.parametrize("channels", [48, 600])
def test_one_scale_for_the_whole_batch(engine: Engine, channels: int) -> None:
    case = problem("float16", (3, 2, channels))
    case.scale = filled(place((3, channels), (0, 1), 0, "float32"), np.random.default_rng(1))
    case.shift = filled(place((3, channels), (1, 0), 0, "float32"), np.random.default_rng(2))
    check(engine, case)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("own", range(4))
def test_each_parameter_has_its_own_dtype(engine: Engine, dtype: str, own: int) -> None:
    dtypes = ["float32"] * 4
    dtypes[own] = dtype
    check(engine, problem(dtype, (2, 2, 64), parameter_dtypes=dtypes))


@pytest.mark.parametrize(
    ("dtype", "shape", "options", "kernel"),
    [
        ("bfloat16", (2, 3, 512), {}, "Li8ELi32E"),
        ("bfloat16", (2, 3, 520), {}, "Li8ELi256E"),
        ("float32", (2, 3, 516), {}, "Li4ELi256E"),
        ("bfloat16", (2, 3, 516), {}, "Li1ELi32E"),
        ("bfloat16", (2, 3, 64), {"ring": misaligned}, "Li1ELi32E"),
        ("bfloat16", (2, 3, 64), {"modulation": padded}, "Li8ELi32E"),
        ("bfloat16", (2, 3, 64), {"modulation": misaligned}, "Li1ELi32E"),
        ("bfloat16", (2, 3, 64), {"modulation": transposed}, "Li1ELi32E"),
        ("float32", (2, 3, 64), {"modulation": sparse}, "Li1ELi32E"),
    ],
)
def test_which_kernel_runs(
    engine: Engine, dtype: str, shape: tuple[int, int, int], options: dict[str, Layout], kernel: str
) -> None:
    """Template arguments in the name: channels of a vector, threads of a row."""
    check(engine, problem(dtype, shape, **options))
    engine.check_launches(kernel)


@pytest.mark.parametrize("channels", [64, 1032])
def test_a_mean_far_from_zero_costs_no_variance(engine: Engine, channels: int) -> None:
    case = problem("float32", (1, 2, channels), read=[0])
    case.coefficients.view[...], case.offsets.view[...] = 1, 1000
    check(engine, case)


@pytest.mark.parametrize("channels", [64, 1032])
def test_a_constant_row_becomes_the_shift(engine: Engine, channels: int) -> None:
    case = problem("float32", (1, 2, channels), read=[0])
    case.coefficients.view[...], case.offsets.view[...] = 0, 0.5
    got = normalize(engine, case)
    assert (got.view[0] == case.shift.view).all()


@pytest.mark.parametrize("channels", [64, 63, 1032])
def test_a_nan_stays_in_its_row(engine: Engine, channels: int) -> None:
    case = problem("bfloat16", (2, 3, channels), read=[1, 0], write=[0])
    slot(case.ring, 1).view[1, 2, channels // 2] = encode(np.array(np.nan), "bfloat16")
    got = np.isnan(normalize(engine, case).values)
    assert got[1, 2].all() and got.sum() == channels


@pytest.mark.parametrize("channels", [64, 1032])
def test_the_same_input_gives_the_same_bits(engine: Engine, channels: int) -> None:
    case = problem("float32", (2, 3, channels))
    first, second = (normalize(engine, case).storage for _ in range(2))
    assert (first == second).all()


def test_no_rows_is_no_launch(engine: Engine) -> None:
    case = problem("float32", (1, 1, 8))
    case.ring = Array(case.ring.storage, 0, (4, 1, 0, 8), (0, 0, 8, 1), "float32")
    normalize(engine, case)
    engine.check_launches()

"""The kernel of forecast, forecast_into and predict against float64; engines.py says how it runs here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from arrays import (
    DTYPES,
    Array,
    Layout,
    close,
    contiguous,
    filled,
    line,
    misaligned,
    padded,
    place,
    random,
    sparse,
    transposed,
)
from engines import Engine, Values, integers

from lesa_kernels.ops import TOLERANCES


def combine(
    engine: Engine,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    coefficients: Array,
    offsets: Array,
    gain: Array | None,
) -> None:
    views, shape = engine.views([*inputs, *outputs]), inputs[0].shape
    values = (Values * 3)(*map(engine.values, (coefficients, offsets, gain)))
    counts = (len(inputs), len(inputs) + len(outputs))
    engine.call("run_combine", inputs[0].dtype, len(shape), integers(shape), *counts, views, values)


def expected(
    inputs: Sequence[Array], coefficients: Array, offsets: Array, gain: Array | None
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [M, *feature] in float64, and the sum of the magnitudes of their terms."""
    results = []
    for change in (lambda values: values, np.abs):
        h, c, d = (
            change(values) for values in (np.stack([i.values for i in inputs]), coefficients.values, offsets.values)
        )
        sums = np.tensordot(c, h, axes=1) + d.reshape(-1, *[1] * (h.ndim - 1))
        results.append(sums if gain is None else h[-1] + change(gain.values).item() * sums)
    return results[0], results[1]


def check_combine(
    engine: Engine,
    inputs: Sequence[Array],
    outputs: Sequence[Array],
    rng: np.random.Generator,
    parameter_dtypes: Sequence[str] = ("float32", "float32", "float32"),
    predicts: bool = False,
) -> None:
    rows, columns = len(outputs), len(inputs)
    coefficients = random((rows, columns), parameter_dtypes[0], rng)
    offsets = random((1, rows), parameter_dtypes[1], rng)
    gain = random((1, 1), parameter_dtypes[2], rng) if predicts else None
    want, scale = expected(inputs, coefficients, offsets, gain)
    combine(engine, inputs, outputs, coefficients, offsets, gain)
    tolerance = TOLERANCES[getattr(torch, inputs[0].dtype)]
    for m, output in enumerate(outputs):
        assert close(output, want[m], scale[m], tolerance)


def check_functional(
    engine: Engine, dtype: str, shape: tuple[int, ...], layout: Layout, history: int, rows: int, **options: Any
) -> None:
    rng = np.random.default_rng(0)
    inputs = [filled(layout(shape, dtype), rng) for _ in range(history)]
    outputs = [contiguous(shape, dtype) for _ in range(rows)]
    check_combine(engine, inputs, outputs, rng, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 255, 1000])
def test_odd_sizes(engine: Engine, dtype: str, size: int) -> None:
    check_functional(engine, dtype, (size,), contiguous, history=4, rows=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("history", [1, 2, 3])
def test_threads_loop_over_large_features(engine: Engine, dtype: str, history: int) -> None:
    """Two blocks of 128 threads for more than 1,024 vectors and a rest."""
    check_functional(engine, dtype, (8803,), contiguous, history, rows=2)
    engine.check_launches("combine", "combine")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("history", "rows"), [(1, 1), (1, 4), (2, 1), (8, 8), (9, 2), (32, 1), (64, 64)])
def test_forecast_counts(engine: Engine, dtype: str, history: int, rows: int) -> None:
    check_functional(engine, dtype, (264,), contiguous, history, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("history", [1, 4, 8, 13, 64])
def test_predict(engine: Engine, dtype: str, history: int) -> None:
    check_functional(engine, dtype, (136,), contiguous, history, rows=1, predicts=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("own", [(True, False, False), (False, True, True), (True, True, True)])
def test_each_parameter_has_its_own_dtype(engine: Engine, dtype: str, own: tuple[bool, bool, bool]) -> None:
    dtypes = [dtype if flag else "float32" for flag in own]
    check_functional(engine, dtype, (64,), contiguous, history=4, rows=1, parameter_dtypes=dtypes, predicts=True)


def test_strided_parameters(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    inputs = [filled(contiguous((40,), "bfloat16"), rng) for _ in range(3)]
    outputs = [contiguous((40,), "bfloat16") for _ in range(2)]
    coefficients = filled(place((2, 3), (2, 5), 1, "float32"), rng)
    offsets = filled(place((1, 2), (0, 7), 0, "bfloat16"), rng)
    want, scale = expected(inputs, coefficients, offsets, None)
    combine(engine, inputs, outputs, coefficients, offsets, None)
    for m, output in enumerate(outputs):
        assert close(output, want[m], scale[m], TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [misaligned, padded, transposed, sparse])
@pytest.mark.parametrize(("history", "rows"), [(4, 2), (20, 1)])
def test_any_strides_and_offsets(engine: Engine, dtype: str, layout: Layout, history: int, rows: int) -> None:
    check_functional(engine, dtype, (5, 16), layout, history, rows)


def test_more_dimensions_than_a_kernel_walks(engine: Engine) -> None:
    check_functional(engine, "float16", (2, 2, 3, 2, 2, 3), sparse, history=2, rows=2)
    engine.check_launches(*["combine"] * 4)


@pytest.mark.parametrize(
    ("layout", "history", "shape", "kernel"),
    [
        (contiguous, 4, (1000,), "Li4ELi8ELb0E"),
        (contiguous, 8, (3, 16), "Li8ELi8ELb0E"),
        (contiguous, 16, (64,), "Li16ELi4ELb0E"),
        (contiguous, 32, (64,), "Li32ELi2ELb0E"),
        (contiguous, 33, (64,), "Li64ELi1ELb0E"),
        (padded, 4, (5, 16), "Li8ELi8ELb1E"),
        (padded, 4, (5, 12), "Li8ELi1ELb1E"),
        (misaligned, 4, (1000,), "Li8ELi1ELb0E"),
        (transposed, 4, (8, 16), "Li8ELi1ELb1E"),
    ],
)
def test_which_kernel_runs(engine: Engine, layout: Layout, history: int, shape: tuple[int, ...], kernel: str) -> None:
    """Template arguments in the name: inputs, elements of a vector, strided or not."""
    check_functional(engine, "bfloat16", shape, layout, history, rows=1)
    engine.check_launches(kernel)


def check_offsets(
    engine: Engine, dtype: str, size: int, offsets: Sequence[int], kernels: Sequence[str] | None = None
) -> None:
    """The last array is the output; nothing around it is written."""
    rng = np.random.default_rng(size)
    arrays = [line(size, offset, dtype) for offset in offsets]
    inputs, output = [filled(array, rng) for array in arrays[:-1]], arrays[-1]
    check_combine(engine, inputs, [output], rng)
    assert output.untouched() == offsets[-1]
    if kernels is not None:
        engine.check_launches(*kernels)


EDGE = "Li8ELi1ELb0E"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_tensors_that_are_misaligned_alike_take_whole_vectors(engine: Engine, dtype: str, offset: int) -> None:
    """The elements before the first vector and behind the last one go one by one."""
    width = 4 if dtype == "float32" else 8
    head = -offset % width
    for tail in (0, 1, width - 1):
        kernels = [EDGE] * (head > 0) + [f"Li2ELi{width}ELb0E"] + [EDGE] * (tail > 0)
        check_offsets(engine, dtype, head + 5 * width + tail, [offset] * 3, kernels)


@pytest.mark.parametrize("tail", range(1, 16))
def test_any_number_of_elements_behind_the_vectors(engine: Engine, tail: int) -> None:
    check_offsets(engine, "bfloat16", 16 + tail, [0] * 4)
    check_offsets(engine, "bfloat16", 16 + tail, [3] * 4)


@pytest.mark.parametrize("size", [1, 5, 6, 13])
def test_no_whole_vector_behind_the_first_boundary(engine: Engine, size: int) -> None:
    check_offsets(engine, "bfloat16", size, [2] * 3, [EDGE])


@pytest.mark.parametrize(
    ("offsets", "width"),
    [
        ((0, 8, 16), 8),
        ((4, 0, 4), 4),
        ((1, 5, 13), 4),
        ((0, 2, 8), 2),
        ((7, 3, 1), 2),
        ((0, 0, 1), 1),
        ((4, 2, 1), 1),
    ],
)
@pytest.mark.parametrize("size", [41, 8803])
def test_the_widest_vectors_that_all_tensors_have_at_the_same_places(
    engine: Engine, offsets: tuple[int, ...], width: int, size: int
) -> None:
    check_offsets(engine, "bfloat16", size, offsets)
    inputs = 2 if width == 8 else 8
    assert any(f"Li{inputs}ELi{width}ELb0E" in kernel for kernel in engine.launches) or not engine.launches


@pytest.mark.parametrize("history", [3, 8, 12, 40])
def test_offsets_of_many_inputs(engine: Engine, history: int) -> None:
    """More than 8 inputs have no narrower vectors: they go one by one."""
    for offsets in ([3] * (history + 1), [*range(history), 0], [2, *[4] * history]):
        check_offsets(engine, "float16", 77, offsets)


@pytest.mark.parametrize(("number", "sizes"), [(0, 40), (1, 40), (7, 40), (2**31 - 1, 400), (2**31 - 2, 400)])
def test_a_quotient_needs_no_division(engine: Engine, number: int, sizes: int) -> None:
    rng = np.random.default_rng(number)
    powers = [2**k + d for k in range(1, 31) for d in (-1, 0, 1)]
    for size in [1, *powers, 2**31 - 1, *rng.integers(1, 2**31, sizes).tolist()]:
        for near in {number, number // size * size, max(number // size * size - 1, 0)}:
            assert engine.number("quotient", *map(ctypes.c_int64, (near, size))) == near // size, (near, size)


class Part(ctypes.Structure):
    _fields_ = (("first", ctypes.c_int64), ("numel", ctypes.c_int64), ("strided", ctypes.c_bool))


@pytest.mark.parametrize(
    ("sizes", "strides"),
    [
        ((3 * 2**31,), (2,)),
        ((5, 2**29 + 1), (2**31, 2)),
        ((2, 3, 2**31 + 5), (2**40, 2**35, 2)),
        ((2, 2**31 + 5), (2**35, 1)),
    ],
)
def test_tensors_of_many_elements_are_divided_among_launches(
    engine: Engine, sizes: tuple[int, ...], strides: tuple[int, ...]
) -> None:
    """Where places are counted in 32 bits; those of contiguous parts are not."""
    parts = (Part * 32)()
    count = engine.number("parts_of", len(sizes), integers(sizes), integers(strides), parts, ctypes.c_int64(32))
    got = [(part.first, part.numel, part.strided) for part in parts[:count]]
    assert sum(numel for _, numel, _ in got) == int(np.prod(sizes))
    for first, numel, strided in got:
        assert numel < 2**31 or not strided
        places = []
        for stride in strides:
            places.append(first // stride)
            first %= stride
        assert first == 0 and all(place < size for place, size in zip(places, sizes, strict=True))
    assert len({first for first, _, _ in got}) == count


@pytest.mark.parametrize(("size", "stride", "width"), [(16, 24, 8), (12, 24, 1), (16, 20, 1)])
def test_rows_take_vectors_only_where_sizes_and_strides_allow(
    engine: Engine, size: int, stride: int, width: int
) -> None:
    rng = np.random.default_rng(0)
    arrays = [place((5, size), (stride, 1), 0, "bfloat16") for _ in range(4)]
    inputs = [filled(array, rng) for array in arrays[:3]]
    check_combine(engine, inputs, arrays[3:], rng)
    assert arrays[3].untouched() == 4 * (stride - size)
    engine.check_launches(f"Li8ELi{width}ELb1E")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("history", [4, 8, 12, 40])
@pytest.mark.parametrize("gap", [0, 3])
def test_outputs_may_take_the_place_of_inputs(engine: Engine, dtype: str, history: int, gap: int) -> None:
    """A ring of history + 2 slots, rows repeated among what is read; slots that are not written keep their bits."""
    rng = np.random.default_rng(0)
    size, slots = 40, history + 2
    ring = filled(place((slots, size), (size + gap, 1), 0, dtype), rng)
    slot = [Array(ring.storage, s * (size + gap), (size,), (1,), dtype) for s in range(slots)]
    read = [*range(1, history), 1]
    write = [2, 0, history - 1, history]
    before = ring.storage.copy()
    inputs = [slot[s] for s in read]
    check_combine(engine, inputs, [slot[s] for s in write], rng)
    for s in set(range(slots)) - set(write):
        assert (slot[s].view == before[slot[s].offset :][:size]).all()
    assert ring.untouched() == gap * (slots - 1)


def test_a_nan_is_not_lost_to_a_coefficient_of_zero(engine: Engine) -> None:
    feature, result = contiguous((16,), "float32"), contiguous((16,), "float32")
    feature.storage[:] = 1
    feature.storage[3] = np.nan
    zero = Array(np.zeros(1, np.float32), 0, (1, 1), (1, 1), "float32")
    combine(engine, [feature], [result], zero, zero, None)
    assert np.isnan(result.storage).nonzero()[0].tolist() == [3]


def test_no_elements_is_no_launch(engine: Engine) -> None:
    one = random((1, 1), "float32", np.random.default_rng(0))
    empty = Array(np.zeros(8, np.float32), 0, (0, 4), (4, 1), "float32")
    combine(engine, [empty], [empty], one, one, None)
    engine.check_launches()


def test_a_refused_launch_is_an_error_that_names_the_op(engine: Engine) -> None:
    engine.fail_launches(209)
    try:
        with pytest.raises(RuntimeError, match=r"^lesa::test: CUDA error: the launch was refused$"):
            check_functional(engine, "float32", (8,), contiguous, history=1, rows=1)
    finally:
        engine.fail_launches(0)

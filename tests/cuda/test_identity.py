"""The kernel of identity and push against NumPy; engines.py says how it runs here."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import DTYPES, Array, Layout, contiguous, encode, filled, line, misaligned, padded, place, sparse
from engines import Engine, integers


def copy(engine: Engine, to: Array, source: Array) -> None:
    views = engine.views([source, to])
    engine.call("run_copy", source.dtype, to.dtype, len(to.shape), integers(to.shape), views)


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("offsets", [(1, 1), (4, 0), (6, 4), (3, 0), (8, 8)])
def test_copy_between_any_offsets(engine: Engine, to: str, source: str, offsets: tuple[int, int]) -> None:
    for size in (3, 70, 8803):
        array, result = filled(line(size, offsets[0], source), np.random.default_rng(0)), line(size, offsets[1], to)
        copy(engine, result, array)
        assert (result.view == encode(array.values, to)).all()
        assert result.untouched() == offsets[1]


@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize(
    ("layout", "shape"), [(contiguous, (8803,)), (padded, (3, 16)), (sparse, (3, 7)), (misaligned, (9,))]
)
def test_copy(engine: Engine, to: str, source: str, layout: Layout, shape: tuple[int, ...]) -> None:
    array = filled(contiguous(shape, source), np.random.default_rng(0))
    result = layout(shape, to)
    gaps = result.storage.size - int(np.prod(shape))
    copy(engine, result, array)
    assert (result.view == encode(array.values, to)).all()
    assert result.untouched() == gaps


def test_copy_converts_the_extremes(engine: Engine) -> None:
    values = np.array([0.0, -0.0, np.inf, -np.inf, 65504.0, 65520.0, 1e-7, 6e-8, 3e38, -1e-40], np.float32)
    array = Array(values, 0, values.shape, (1,), "float32")
    for dtype in ("float16", "bfloat16"):
        result = contiguous(values.shape, dtype)
        copy(engine, result, array)
        with np.errstate(over="ignore"):
            want = encode(values, dtype)
        assert (result.storage.view(np.uint16) == want.view(np.uint16)).all()


def test_copy_of_one_dtype_keeps_the_bits_of_a_nan(engine: Engine) -> None:
    bits = np.array([0x7C01, 0xFE55, 0x3C00], np.uint16)
    array = Array(bits.view(np.float16), 0, (3,), (1,), "float16")
    result = contiguous((3,), "float16")
    copy(engine, result, array)
    assert (result.storage.view(np.uint16) == bits).all()


def test_rows_with_gaps_between_them(engine: Engine) -> None:
    for size, stride in ((16, 24), (12, 24), (16, 20)):
        array, result = (place((5, size), (stride, 1), 0, "bfloat16") for _ in range(2))
        filled(array, np.random.default_rng(0))
        copy(engine, result, array)
        assert (result.view == array.view).all()
        assert result.untouched() == 4 * (stride - size)


def test_no_elements_is_no_launch(engine: Engine) -> None:
    empty = Array(np.zeros(8, np.float32), 0, (0, 4), (4, 1), "float32")
    copy(engine, empty, empty)
    engine.check_launches()

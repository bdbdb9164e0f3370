"""The kernels of gram against float64; engines.py says how they run here."""

from __future__ import annotations

from collections.abc import Sequence

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
    sparse,
    tensor_of,
    transposed,
)
from engines import Engine, integers
from op_inputs import assert_close_gram

from lesa_kernels.ops import TOLERANCES, reference


def features_of(dtype: str, shape: tuple[int, ...], layout: Layout, count: int) -> list[Array]:
    """Random features, alike enough that a wrong pair shows: each has a mean and a scale of its own."""
    rng = np.random.default_rng(0)
    features = [filled(layout(shape, dtype), rng) for _ in range(count)]
    for k, feature in enumerate(features):
        feature.view[...] = encode((feature.values + 0.1 * k) * (1 + 0.05 * k), dtype)
    return features


def gram(engine: Engine, features: Sequence[Array]) -> Array:
    """Run the kernels; result and workspace are poison before."""
    size = len(features) + 1
    result = contiguous((size, size), "float64")
    workspace = contiguous((engine.number("workspace_of_gram"),), "float64")
    shape, dtype = features[0].shape, features[0].dtype
    views, places = engine.views(features), [engine.pointer(array) for array in (workspace, result)]
    engine.call("run_gram", dtype, len(shape), integers(shape), len(features), views, *places)
    return result


def check(engine: Engine, features: Sequence[Array]) -> Array:
    """Compare with the reference on float64 features."""
    got, wide = gram(engine, features), list(map(tensor_of, features))
    want, scale = reference.gram(wide), reference.gram([feature.abs() for feature in wide])
    assert close(got, want, scale, TOLERANCES[torch.float32])
    assert (got.values == got.values.T).all()
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 7, 255, 1000, 8803])
def test_odd_sizes(engine: Engine, dtype: str, size: int) -> None:
    check(engine, features_of(dtype, (size,), contiguous, count=5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 8, 9, 10, 12, 13, 16])
def test_numbers_of_features(engine: Engine, dtype: str, count: int) -> None:
    check(engine, features_of(dtype, (264,), contiguous, count))


@pytest.mark.parametrize("count", [17, 24, 31, pytest.param(64, marks=pytest.mark.exhaustive)])
def test_more_features_than_a_kernel_holds(engine: Engine, count: int) -> None:
    check(engine, features_of("bfloat16", (44,), contiguous, count))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", [misaligned, padded, transposed, sparse])
@pytest.mark.parametrize("count", [4, 14])
def test_any_strides_and_offsets(engine: Engine, dtype: str, layout: Layout, count: int) -> None:
    check(engine, features_of(dtype, (5, 16), layout, count))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("offsets", "width"), [((1, 5, 9), 4), ((0, 2, 8), 2), ((3, 2, 1), 1), ((8,) * 12, 4), ((*range(12),), 1)]
)
def test_offsets_of_each_its_own(engine: Engine, dtype: str, offsets: tuple[int, ...], width: int) -> None:
    """In the widest vectors that all have at the same places; more than 9 features have only one width."""
    features = [filled(line(587, offset, dtype), np.random.default_rng(k)) for k, offset in enumerate(offsets)]
    check(engine, features)
    inputs = {3: 5 if (dtype, width) == ("float32", 4) else 9, 12: 12 if width == 4 else 16}[len(offsets)]
    assert any(f"Li{inputs}ELi{width}ELb0E" in kernel for kernel in engine.launches) or not engine.launches


def test_features_of_different_layouts(engine: Engine) -> None:
    layouts = (contiguous, transposed, padded, sparse)
    check(engine, [features_of("float16", (9, 8), layout, k + 1)[k] for k, layout in enumerate(layouts)])


def test_more_dimensions_than_a_kernel_walks(engine: Engine) -> None:
    """Each block adds to what it wrote in the launch before."""
    check(engine, features_of("float16", (2, 2, 3, 2, 2, 3), sparse, count=2))
    engine.check_launches(*["gram_kernel"] * 4, "gram_matrix_kernel")


@pytest.mark.parametrize(
    ("layout", "count", "shape", "kernels"),
    [
        (contiguous, 2, (1000,), ["Li2ELi8ELb0E"]),
        (contiguous, 3, (1000,), ["Li5ELi8ELb0E"]),
        (contiguous, 9, (1000,), ["Li9ELi4ELb0E"]),
        (contiguous, 9, (1001,), ["Li9ELi4ELb0E", "Li9ELi1ELb0E"]),
        (contiguous, 12, (64,), ["Li12ELi4ELb0E"]),
        (contiguous, 13, (64,), ["Li16ELi4ELb0E"]),
        (contiguous, 17, (64,), ["Li16ELi4ELb0E", "matrix", "Li9ELi4ELb0E", "matrix", "Li9ELi4ELb0E"]),
        (padded, 4, (5, 16), ["Li9ELi4ELb1E"]),
        (padded, 10, (5, 16), ["Li16ELi1ELb1E"]),
        (misaligned, 4, (1000,), ["Li9ELi1ELb0E", "Li5ELi8ELb0E", "Li9ELi1ELb0E"]),
    ],
)
def test_which_kernel_runs(
    engine: Engine, layout: Layout, count: int, shape: tuple[int, ...], kernels: list[str]
) -> None:
    """Template arguments in the name: inputs, elements of a vector, strided or not."""
    check(engine, features_of("bfloat16", shape, layout, count))
    engine.check_launches(*kernels, "matrix")


def test_the_same_input_gives_the_same_bits(engine: Engine) -> None:
    features = features_of("float32", (8803,), contiguous, count=9)
    first, second = (gram(engine, features).storage for _ in range(2))
    assert (first == second).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("layout", "shape"), [(contiguous, (2051,)), (padded, (5, 16)), (misaligned, (300,))])
def test_products_that_leave_the_range_of_float32(
    engine: Engine, dtype: str, layout: Layout, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    features = [filled(layout(shape, dtype), rng) for _ in range(5)]
    scales = np.array([1e25, 1.0, 1e-25])
    mixed = scales[rng.integers(3, size=shape)]
    for feature, scale in zip(features, [*scales, mixed, np.sort(mixed, axis=None).reshape(shape)], strict=True):
        feature.view[...] = encode(feature.values * scale, dtype)
    assert_close_gram(torch.from_numpy(gram(engine, features).values.copy()), list(map(tensor_of, features)))


def test_a_nan_stays_in_its_row_and_column(engine: Engine) -> None:
    features = features_of("bfloat16", (40,), contiguous, count=6)
    features[2].view[17] = encode(np.array(np.nan), "bfloat16")
    got = np.isnan(gram(engine, features).values)
    assert got[2].all() and got[:, 2].all() and got.sum() == 13


def test_no_elements_give_zeros(engine: Engine) -> None:
    storage = features_of("float32", (1,), contiguous, count=1)[0].storage
    got = gram(engine, [Array(storage, 0, (0, 4), (4, 1), "float32") for _ in range(2)])
    engine.check_launches("matrix")
    assert not got.values.any()


def test_whole_numbers_are_exact(engine: Engine) -> None:
    """What float32 holds exactly, runs, warps and blocks must add up without a rounding, and count N itself."""
    features = [contiguous((2 * 256 * 8 * 5,), "float32") for _ in range(5)]
    for k, feature in enumerate(features):
        feature.view[...] = (np.arange(feature.shape[0]) * (k + 3)) % 7 - 2
    wide = np.stack([*(feature.values for feature in features), np.ones(features[0].shape)])
    assert (gram(engine, features).values == wide @ wide.T).all()


def test_long_sums_keep_their_precision(engine: Engine) -> None:
    """640 equal terms a thread: float32 alone would round the 1.4e-5 away in every one from 256 on."""
    feature = contiguous((2 * 256 * 160 * 4,), "float32")
    feature.view[...] = 1 + 1.4e-5
    check(engine, [feature])

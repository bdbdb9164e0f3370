"""The kernels of push_scaled and forecast_scaled_into; engines.py says how they run here."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from arrays import DTYPES, Array, Layout, close, contiguous, encode, filled, misaligned, random, row_major, tensor_of
from engines import Engine, Rows, Slot, Values

from lesa_kernels import contract, reference
from lesa_kernels.reference import TOLERANCES

SCALED = ("int8", "float8_e4m3fn")
# Half the distance of two neighbours, of an element's magnitude and of the row's scale.
STEPS = {"int8": (0.0, 0.5), "float8_e4m3fn": (2.0**-4, 2.0**-10)}


@dataclass
class Ring:
    """A scaled ring: elements [slots, rows, channels] and scales [slots, rows]."""

    elements: Array
    scales: Array

    @property
    def dtype(self) -> str:
        return self.elements.dtype

    @property
    def features(self) -> torch.Tensor:
        """What the slots hold, float64."""
        return tensor_of(self.elements) * tensor_of(self.scales).unsqueeze(-1)

    def slots(self, engine: Engine, indices: Sequence[int]) -> list[Slot]:
        """Slots for the kernels; none for -1."""
        elements, scales = engine.pointer(self.elements).value or 0, engine.pointer(self.scales).value or 0
        _, rows, channels = self.elements.shape
        return [
            Slot(None, None) if index < 0 else Slot(elements + index * rows * channels, scales + 4 * index * rows)
            for index in indices
        ]


def ring_of(dtype: str, slots: int, rows: int, channels: int, layout: Layout = contiguous) -> Ring:
    """A ring of random features, the rows of very different size."""
    rng = np.random.default_rng(0)
    features = rng.standard_normal((slots, rows, channels)) * 10.0 ** rng.integers(-3, 3, (slots, rows, 1))
    elements, scales = reference.scale_rows(torch.from_numpy(features).float(), getattr(torch, dtype))
    ring = Ring(layout((slots, rows, channels), dtype), contiguous((slots, rows), "float32"))
    ring.elements.view[...] = encode(elements.double().numpy(), dtype)
    ring.scales.view[...] = scales.numpy()
    return ring


def push(engine: Engine, ring: Ring, feature: Array, slot: int) -> None:
    """Run the kernel and compare with the reference, bit by bit; other slots keep theirs."""
    wanted = Ring(
        *(Array(a.storage.copy(), a.offset, a.shape, a.strides, a.dtype) for a in (ring.elements, ring.scales))
    )
    elements, scales = reference.scale_rows(tensor_of(feature).float(), getattr(torch, ring.dtype))
    wanted.elements.view[slot] = encode(elements.float().numpy(), ring.dtype)
    wanted.scales.view[slot] = scales.numpy()
    rows = ctypes.byref(Rows(*feature.shape))
    [place] = ring.slots(engine, [slot])
    engine.call("run_copy_scaled", ring.dtype, feature.dtype, rows, engine.pointer(feature), ctypes.byref(place))
    assert ring.elements.storage.tobytes() == wanted.elements.storage.tobytes()
    np.testing.assert_array_equal(ring.scales.storage, wanted.scales.storage)


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 8, 90, 512, 513, 520, 3072, 4096, 4104])
def test_push(engine: Engine, scaled: str, dtype: str, channels: int) -> None:
    ring = ring_of(scaled, 3, 2, channels)
    push(engine, ring, random((2, channels), dtype, np.random.default_rng(1)), slot=1)


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("layout", [contiguous, misaligned])
@pytest.mark.parametrize(("rows", "channels"), [(19, 40), (19, 9), (5, 600)])
def test_push_of_many_rows(engine: Engine, scaled: str, layout: Layout, rows: int, channels: int) -> None:
    feature = filled(layout((rows, channels), "bfloat16"), np.random.default_rng(1))
    push(engine, ring_of(scaled, 2, rows, channels, layout), feature, slot=0)
    engine.check_launches("copy_scaled")


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("channels", [64, 63, 600])
def test_push_of_rows_that_have_no_scale(engine: Engine, scaled: str, channels: int) -> None:
    """Zeros, a row too small, the smallest that counts, the largest, an infinity, a NaN, a NaN and an infinity."""
    feature = random((7, channels), "float32", np.random.default_rng(1))
    feature.view[:, -1] = [0, 2.0**-101, 2.0**-100, 3e38, np.inf, np.nan, np.nan]
    feature.view[:3, :-1] *= np.array([[0], [2.0**-110], [2.0**-110]])
    feature.view[6, 5] = -np.inf
    ring = ring_of(scaled, 2, 7, channels)
    push(engine, ring, feature, slot=1)
    assert (ring.scales.view[1] == 0).tolist() == [True, True, *[False] * 5]
    assert np.isnan(ring.scales.view[1]).tolist() == [*[False] * 4, True, True, True]


def test_push_of_rows_without_channels(engine: Engine) -> None:
    ring = Ring(Array(np.zeros(8, np.int8), 0, (2, 3, 0), row_major((2, 3, 0)), "int8"), contiguous((2, 3), "float32"))
    push(engine, ring, Array(np.zeros(8, np.float32), 0, (3, 0), (0, 1), "float32"), slot=1)
    assert (ring.scales.view[1] == 0).all()


@dataclass
class Problem:
    """A forecast in a scaled ring."""

    ring: Ring
    read: Sequence[int]
    write: Sequence[int]
    out: Array
    coefficients: Array
    offsets: Array


def problem(
    scaled: str,
    dtype: str,
    rows: int,
    channels: int,
    read: Sequence[int] = (1, 0, 2),
    write: Sequence[int] = (3, -1),
    layout: Layout = contiguous,
    parameter_dtypes: Sequence[str] = ("float32", "float32"),
) -> Problem:
    rng = np.random.default_rng(2)
    ring = ring_of(scaled, max(*read, *write) + 2, rows, channels, layout)
    parameters = [
        random(size, kind, rng)
        for size, kind in zip(((len(write), len(read)), (1, len(write))), parameter_dtypes, strict=True)
    ]
    return Problem(ring, read, write, layout((len(write), rows, channels), dtype), *parameters)


def forecast(engine: Engine, case: Problem) -> None:
    _, rows, channels = case.ring.elements.shape
    counts = (ctypes.byref(Rows(rows, channels)), len(case.read), len(case.write))
    slots = case.ring.slots(engine, [*case.read, *case.write])
    values = (Values * 2)(engine.values(case.coefficients), engine.values(case.offsets))
    tensors = ((Slot * len(slots))(*slots), engine.pointer(case.out))
    engine.call("run_forecast_scaled", case.ring.dtype, case.out.dtype, *counts, *tensors, values)


def check(engine: Engine, case: Problem) -> None:
    """Compare with float64: what is handed out, and what is kept, which may be half a step off."""
    ring, features = case.ring, case.ring.features
    elements, scales = ring.elements.view.copy(), ring.scales.view.copy()
    history, coefficients, offsets = (
        [features[k] for k in case.read],
        *map(tensor_of, (case.coefficients, case.offsets)),
    )
    want = torch.stack(reference.forecast(history, coefficients, offsets[0]))
    size = torch.stack(reference.forecast([h.abs() for h in history], coefficients.abs(), offsets[0].abs()))
    forecast(engine, case)
    assert close(case.out, want, size, TOLERANCES[getattr(torch, case.out.dtype)])
    got, single = ring.features, TOLERANCES[torch.float32]
    relative, absolute = STEPS[ring.dtype]
    for m, index in enumerate(case.write):
        if index >= 0:
            room = single.absolute + single.relative * size[m].amax(-1, keepdim=True)
            scale = want[m].abs().amax(-1, keepdim=True) / contract.SCALED_LIMITS[getattr(torch, ring.dtype)]
            assert (torch.from_numpy(ring.scales.view[index]).unsqueeze(-1) - scale).abs().le(room).all()
            error = (got[index] - want[m]).abs()
            assert error.le(1.001 * (relative * want[m].abs() + absolute * scale) + room).all()
    for index in set(range(len(elements))) - set(case.write):
        assert ring.elements.view[index].tobytes() == elements[index].tobytes()
        assert ring.scales.view[index].tobytes() == scales[index].tobytes()


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 7, 8, 90, 512, 520, 3072])
def test_lengths_of_rows(engine: Engine, scaled: str, dtype: str, channels: int) -> None:
    check(engine, problem(scaled, dtype, 2, channels))


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize(("rows", "channels"), [(19, 40), (19, 9), (5, 600)])
def test_teams_loop_over_many_rows(engine: Engine, scaled: str, rows: int, channels: int) -> None:
    """Two blocks of eight warps, or of one row each."""
    check(engine, problem(scaled, "bfloat16", rows, channels))
    engine.check_launches("forecast_scaled")


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize(("history", "forecasts"), [(1, 1), (1, 6), (8, 1), (8, 6), (9, 2), (33, 3), (64, 64)])
@pytest.mark.parametrize("channels", [24, 25, pytest.param(600, marks=pytest.mark.exhaustive)])
def test_counts(engine: Engine, scaled: str, history: int, forecasts: int, channels: int) -> None:
    read, write = [k % 5 for k in range(history)], [m if m % 3 else -1 for m in range(forecasts)]
    check(engine, problem(scaled, "float16", 2, channels, read, write))


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("history", [4, 8, 12])
@pytest.mark.parametrize("channels", [40, 41, pytest.param(2056, marks=pytest.mark.exhaustive)])
def test_forecasts_may_take_the_place_of_inputs(
    engine: Engine, scaled: str, dtype: str, history: int, channels: int
) -> None:
    """Each is written while others are still to come that read what stood there."""
    read = [*range(1, history), 1]
    check(engine, problem(scaled, dtype, 2, channels, read, write=[2, 0, -1, history - 1, 1]))


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("channels", [600, 2056, 70])
def test_forecasts_of_several_turns_may_take_the_place_of_inputs(engine: Engine, scaled: str, channels: int) -> None:
    check(engine, problem(scaled, "bfloat16", 2, channels, read=[1, 2, 1], write=[2, 0, -1, 1]))


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("channels", [40, 41, 600])
def test_nothing_is_kept(engine: Engine, scaled: str, channels: int) -> None:
    check(engine, problem(scaled, "bfloat16", 19, channels, write=[-1, -1]))


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("own", [(True, False), (False, True)])
def test_each_parameter_has_its_own_dtype(engine: Engine, scaled: str, own: tuple[bool, bool]) -> None:
    dtypes = ["bfloat16" if flag else "float32" for flag in own]
    check(engine, problem(scaled, "bfloat16", 2, 64, parameter_dtypes=dtypes))


@pytest.mark.parametrize(
    ("channels", "history", "layout", "kernel"),
    [
        (512, 8, contiguous, "Li8ELi32E"),
        (520, 8, contiguous, "Li8ELi256E"),
        (516, 8, contiguous, "Li1ELi32E"),
        (64, 9, contiguous, "Li1ELi32E"),
        (64, 8, misaligned, "Li1ELi32E"),
    ],
)
def test_which_kernel_runs(engine: Engine, channels: int, history: int, layout: Layout, kernel: str) -> None:
    """Template arguments in the name: channels of a vector, threads of a row."""
    check(engine, problem("int8", "bfloat16", 2, channels, read=[k % 3 for k in range(history)], layout=layout))
    engine.check_launches(kernel)


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("channels", [64, 63, 600])
def test_what_has_no_scale_is_kept_as_nan_or_zero(engine: Engine, scaled: str, channels: int) -> None:
    """A row that reads as NaN, one that is all zeros, one whose forecast overflows."""
    case = problem(scaled, "float32", 4, channels, read=[0, 1], write=[1])
    case.coefficients.view[...], case.offsets.view[...] = 1, 0
    case.ring.scales.view[0, 0] = np.nan
    case.ring.scales.view[:, 1] = 0
    case.ring.scales.view[:2, 2] = 3e38
    ordinary = case.ring.features[:2, 3].sum(0)
    forecast(engine, case)
    assert np.isnan(case.out.view[0, 0]).all()
    assert (case.out.view[0, 1] == 0).all()
    assert np.isnan(case.ring.scales.view[1]).tolist() == [True, False, True, False]
    assert case.ring.scales.view[1, 1] == 0
    assert not tensor_of(case.ring.elements)[1, :3].any()
    np.testing.assert_allclose(case.out.view[0, 3], ordinary, rtol=1e-5, atol=1e-3)


def test_a_nan_is_not_lost_to_a_coefficient_of_zero(engine: Engine) -> None:
    case = problem("int8", "float32", 1, 16, read=[0], write=[1])
    case.coefficients.view[...], case.offsets.view[...] = 0, 1
    case.ring.scales.view[0] = np.nan
    forecast(engine, case)
    assert np.isnan(case.out.view).all() and np.isnan(case.ring.scales.view[1]).all()


@pytest.mark.parametrize("scaled", SCALED)
@pytest.mark.parametrize("channels", [64, 600])
def test_the_same_input_gives_the_same_bits(engine: Engine, scaled: str, channels: int) -> None:
    bits = []
    for _ in range(2):
        case = problem(scaled, "bfloat16", 3, channels)
        forecast(engine, case)
        bits.append([array.storage.tobytes() for array in (case.out, case.ring.elements, case.ring.scales)])
    assert bits[0] == bits[1]


def test_rows_without_channels_are_kept_with_scale_zero(engine: Engine) -> None:
    ring = Ring(Array(np.zeros(8, np.int8), 0, (2, 3, 0), row_major((2, 3, 0)), "int8"), contiguous((2, 3), "float32"))
    one = random((1, 1), "float32", np.random.default_rng(0))
    forecast(engine, Problem(ring, [0], [1], Array(one.storage, 0, (1, 3, 0), (0, 0, 1), "float32"), one, one))
    assert (ring.scales.view[1] == 0).all() and np.isnan(ring.scales.view[0]).all()


def test_no_rows_is_no_launch(engine: Engine) -> None:
    ring = Ring(
        Array(np.zeros(8, np.int8), 0, (2, 0, 8), (0, 8, 1), "int8"),
        Array(np.zeros(8, np.float32), 0, (2, 0), (0, 1), "float32"),
    )
    one = random((1, 1), "float32", np.random.default_rng(0))
    empty = Array(np.zeros(8, np.float32), 0, (1, 0, 8), (0, 8, 1), "float32")
    forecast(engine, Problem(ring, [0], [1], empty, one, one))
    engine.check_launches()
    push(engine, ring, Array(empty.storage, 0, (0, 8), (8, 1), "float32"), slot=0)
    engine.check_launches()

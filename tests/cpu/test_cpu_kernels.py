"""What only the C++ kernels have: instruction sets, threads, vector tails, conversions bit by bit, strides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from cpu_library import ISAS, facts, native, needs_library
from op_inputs import assert_close_gram, extreme_features
from torch import Tensor

from lesa_kernels.ops import TOLERANCES, reference

pytestmark = needs_library

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIZES = [0, 1, 7, 63, 1000, 4097]
COUNTS = [1, 2, 3, 4, 8, 17, 64]
ops = torch.ops.lesa
Layout = Callable[[tuple[int, ...], torch.dtype], Tensor]


def _plain(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _misaligned(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _plain((torch.Size(shape).numel() + 1,), dtype)[1:].view(shape)


def _long_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _plain((*shape[:-1], shape[-1] + 5), dtype)[..., 2 : shape[-1] + 2]


def _transposed(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _plain(shape[::-1], dtype).permute(tuple(reversed(range(len(shape)))))


def _strided(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _plain((*shape[:-1], 3 * shape[-1]), dtype)[..., ::3]


def _expanded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return _plain((*shape[:-1], 1), dtype).expand(shape)


LAYOUTS: list[Layout] = [_plain, _misaligned, _long_rows, _transposed, _strided, _expanded]


def _assert_within(got: Tensor, want: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    assert got.shape == want.shape and got.is_contiguous()
    assert bool(((got.double() - want).abs() <= tolerance.absolute + tolerance.relative * scale).all())


def _wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def _parameters(rows: int, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if dtype == torch.float64 else torch.float32
    return _plain((rows, count), kind), _plain((rows,), kind)


def _check_forecast(got: Sequence[Tensor], history: Sequence[Tensor], coefficients: Tensor, offsets: Tensor) -> None:
    want = reference.forecast(_wide(history), coefficients.double(), offsets.double())
    magnitudes = [feature.abs() for feature in _wide(history)]
    scales = reference.forecast(magnitudes, coefficients.double().abs(), offsets.double().abs())
    for row, value, scale in zip(got, want, scales, strict=True):
        _assert_within(row, value, scale, history[0].dtype)


def _predict_scale(history: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    weight, bias, gain = (parameter.double().abs() for parameter in parameters)
    return reference.predict([feature.abs() for feature in _wide(history)], weight, bias, gain)


def test_the_library_names_its_build_and_the_widest_set_it_runs(isa: str) -> None:
    before = facts()
    assert before["compiler"] and before["compiled"] == ISAS
    assert before["chosen"] == isa and before["vector_bits"] == {"avx512": 512, "avx2": 256, "baseline": 128}[isa]
    assert native().lesa_cpu_set_isa(b"sse9") == 1 and facts() == before
    assert native().lesa_cpu_set_isa(b"auto") == 0 and facts()["chosen"] == before["supported"][0]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_predict_on_every_instruction_set(isa: str, size: int, dtype: torch.dtype) -> None:
    for count in COUNTS:
        history = [_misaligned((size,), dtype) for _ in range(count)]
        parameters = [*_parameters(1, count, dtype), _plain((), torch.float32)]
        weight, bias, gain = parameters[0][0], parameters[1], parameters[2].to(dtype)
        got = ops.predict(history, weight, bias, gain)
        want = reference.predict(_wide(history), weight.double(), bias.double(), gain.double())
        _assert_within(got, want, _predict_scale(history, (weight, bias, gain)), dtype)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [*range(1, 10), 17, 64])
def test_forecast_on_every_instruction_set(isa: str, rows: int, dtype: torch.dtype) -> None:
    for count, size in zip(COUNTS, [63, 7, 1000, 1, 4097, 129, 65], strict=True):
        history = [_plain((size,), dtype) for _ in range(count)]
        coefficients, offsets = _parameters(rows, count, dtype)
        _check_forecast(ops.forecast(history, coefficients, offsets), history, coefficients, offsets)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 300), (129, 2)], ids=str)
def test_forecast_of_strided_features(isa: str, shape: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> None:
    history = [layout(shape, dtype) for _ in range(3)] + [_plain(shape, dtype)]
    coefficients, offsets = _parameters(4, 2, dtype)
    matrix = coefficients.t().contiguous().t().repeat(1, 2)
    for rows in (matrix, matrix.t().contiguous().t()):
        _check_forecast(ops.forecast(history, rows, offsets), history, rows, offsets)


def test_a_layout_of_ten_dimensions_that_do_not_merge() -> None:
    shape = (2, 3) * 5
    history = [_transposed(shape, torch.float32), _plain(shape, torch.float32)]
    coefficients, offsets = _parameters(2, 2, torch.float32)
    _check_forecast(ops.forecast(history, coefficients, offsets), history, coefficients, offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 6, 12])
@pytest.mark.parametrize("layout", LAYOUTS[:-1], ids=lambda layout: layout.__name__)
def test_slots_that_are_read_and_written(isa: str, layout: Layout, rows: int, dtype: torch.dtype) -> None:
    ring = layout((13, 5, 131), dtype)
    history = [ring[slot].clone() for slot in (3, 0, 12, 3, 7)]
    before = ring.clone()
    coefficients, offsets = _parameters(rows, 5, dtype)
    write = [7, 3, 0, 12, 1, 2, 4, 5, 6, 8, 9, 10][:rows]
    ops.forecast_into(ring, coefficients, offsets, [3, 0, 12, 3, 7], write)
    _check_forecast([ring[slot].contiguous() for slot in write], history, coefficients, offsets)
    for slot in set(range(13)) - set(write):
        assert torch.equal(ring[slot], before[slot])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [8, 9])
def test_large_outputs_go_past_the_cache_and_are_the_same(isa: str, rows: int, dtype: torch.dtype) -> None:
    size = 64 * (facts()["streaming_bytes"] // (64 * rows * dtype.itemsize) + 1) + 9
    memory = torch.empty((rows + 2) * (size + 55) + 3, dtype=dtype)
    coefficients, offsets = _parameters(rows, 2, dtype)
    read, write = [rows, rows + 1], list(range(rows))
    for start in (0, 3):
        ring = memory[start:].as_strided((rows + 2, size), (size + 55, 1))
        ring[rows:] = torch.arange(2.0 * size).remainder_(251).view(2, size)
        ops.forecast_into(ring, coefficients, offsets, read, write)
        whole = ring[:rows].clone()
        for part, want in zip(ring.split(size // 5, dim=1), whole.split(size // 5, dim=1), strict=True):
            part[:rows] = torch.nan
            ops.forecast_into(part, coefficients, offsets, read, write)
            assert torch.equal(part[:rows], want)


@pytest.mark.parametrize("rows", [1, 3, 5])
def test_a_nan_of_any_bits_stays_a_nan(isa: str, rows: int) -> None:
    bits = torch.tensor([0x7FFF, 0x7F81, 0x7FC0, 0x7F80, 0x3F80], dtype=torch.int16).repeat(60)
    feature = torch.cat([bits, bits | torch.tensor(-0x8000, dtype=torch.int16)]).view(torch.bfloat16)
    ones, zeros = torch.ones(rows, 1), torch.zeros(rows)
    for row in ops.forecast([feature], ones, zeros):
        assert torch.equal(row.isnan(), feature.isnan()) and torch.equal(row.isinf(), feature.isinf())
    strange = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    for nan in strange.split(1):
        for parameters in ((nan.expand(rows, 1), zeros), (ones, nan.expand(rows))):
            assert all(row.isnan().all() for row in ops.forecast([feature], *parameters))
        assert ops.predict([feature], nan, zeros[:1], ones[0]).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_gradients_on_every_instruction_set(isa: str, layout: Layout, dtype: torch.dtype) -> None:
    for count, shape in [(1, (7,)), (4, (3, 1000)), (8, (2, 3, 4097)), (64, (65,)), (3, (0, 4))]:
        history = [_plain(shape, dtype), *(layout(shape, dtype) for _ in range(count - 1))]
        grad, (weights, bias), gain = layout(shape, dtype), _parameters(1, count, dtype), _plain((1, 1), dtype)
        parameters = (weights[0], bias, gain)
        got_history, *got = ops.predict_backward(grad, history, *parameters, True)
        weight, b, g = _wide(parameters)
        want_history, *want = reference.predict_backward(grad.double(), _wide(history), weight, b, g, True)
        for mine, value in zip(got_history, want_history, strict=True):
            _assert_within(mine, value, grad.double().abs() * (1 + (g * weight).abs().max()), dtype)
        magnitudes = [feature.abs() for feature in _wide(history)]
        _, *scales = reference.predict_backward(grad.double().abs(), magnitudes, weight.abs(), b.abs(), g.abs(), False)
        for mine, value, scale, parameter in zip(got, want, scales, parameters, strict=True):
            assert mine.dtype == parameter.dtype and mine.shape == parameter.shape
            _assert_within(mine, value, scale, parameter.dtype)


def test_the_number_of_threads_changes_no_bit(isa: str, threads: None) -> None:
    for dtype in DTYPES:
        history = [_misaligned((3, 70001), dtype) for _ in range(4)]
        coefficients, offsets = _parameters(3, 4, dtype)
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            _, *gradients = ops.predict_backward(history[0], history, coefficients[0], offsets[:1], offsets[:1], False)
            row = ops.predict(history, coefficients[0], offsets[:1], offsets[:1])
            results.append([row, *ops.forecast(history, coefficients, offsets), *gradients])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_layout_changes_no_bit_of_a_forecast(isa: str) -> None:
    values = [_plain((37, 150), torch.bfloat16) for _ in range(5)]
    coefficients, offsets = _parameters(3, 5, torch.bfloat16)
    want = ops.forecast(values, coefficients, offsets)
    for layout in LAYOUTS[:-1]:
        history = [layout((37, 150), torch.bfloat16).copy_(value) for value in values]
        for a, b in zip(want, ops.forecast(history, coefficients, offsets), strict=True):
            assert torch.equal(a, b)


def _all_halves(dtype: torch.dtype) -> Tensor:
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def _assert_same_numbers(got: Tensor, want: Tensor) -> None:
    nan = torch.isnan(want)
    assert torch.equal(torch.isnan(got), nan)
    assert torch.equal(got[~nan], want[~nan]) and torch.equal(torch.signbit(got[~nan]), torch.signbit(want[~nan]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_precision_number_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    ring = torch.empty(1, 2**16)
    ops.push(ring, _all_halves(dtype), 0)
    _assert_same_numbers(ring[0], _all_halves(dtype).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_to_nearest_even_everywhere(isa: str, dtype: torch.dtype) -> None:
    exact = _all_halves(dtype).float()
    above = torch.nextafter(exact, torch.tensor(torch.inf))
    bits = torch.arange(0, 2**32 - 1, 9973, dtype=torch.int64)
    anywhere = (bits - 2**31).to(torch.int32).view(torch.float32)
    half_way = (exact[1:].double() + exact[:-1].double()).div(2).float()
    near = torch.cat([torch.nextafter(half_way, torch.tensor(limit)) for limit in (torch.inf, -torch.inf)])
    values = torch.cat([exact, above, anywhere, half_way, near])
    ring = torch.empty(1, len(values), dtype=dtype)
    ops.push(ring, values, 0)
    _assert_same_numbers(ring[0], values.to(dtype))


@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("target", DTYPES, ids=str)
def test_push_converts_as_copy_does(isa: str, source: torch.dtype, target: torch.dtype) -> None:
    for shape in [(), (0,), (7,), (3, 5, 300), (40, 70)]:
        for layout in LAYOUTS if shape else [_plain]:
            feature = (layout(shape, torch.float64) * 300).to(source)
            ring = _strided((3, *shape, 1), target)[..., 0]
            want = ring.clone()
            want[1].copy_(feature)
            ops.push(ring, feature, 1)
            assert torch.equal(ring, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_identity_is_a_fresh_copy(layout: Layout, dtype: torch.dtype) -> None:
    for shape in [(0,), (7,), (3, 5, 300), (40, 70)]:
        feature = layout(shape, dtype)
        got = ops.identity(feature)
        assert got.is_contiguous() and (not got.numel() or got.data_ptr() != feature.data_ptr())
        assert torch.equal(got, feature)


def test_nan_and_infinity_pass_through(isa: str) -> None:
    for dtype in DTYPES:
        history = [_plain((40,), dtype), torch.ones(40, dtype=dtype)]
        history[0][3], history[0][39], history[1][20] = torch.nan, torch.inf, -torch.inf
        got = ops.forecast(history, torch.tensor([[0.0, 0.5], [1.0, 1.0]]), torch.zeros(2))
        assert torch.isnan(got[0]).nonzero().flatten().tolist() == [3, 39]
        assert torch.isnan(got[1]).nonzero().flatten().tolist() == [3]
        assert torch.isinf(got[1]).nonzero().flatten().tolist() == [20, 39]


def test_a_ring_or_feature_that_overlaps_itself_is_refused() -> None:
    ring = torch.zeros(4, 6)
    with pytest.raises(RuntimeError, match=r"lesa::push: ring must not overlap itself in memory, got strides \(0, 1\)"):
        ops.push(torch.zeros(6).expand(4, 6), torch.ones(6), 0)
    with pytest.raises(RuntimeError, match=r"ring must not overlap itself in memory, got strides \(2, 1\)"):
        ops.forecast_into(torch.zeros(20).unfold(0, 6, 2), torch.ones(1, 1), torch.ones(1), [0], [1])
    with pytest.raises(RuntimeError, match=r"lesa::push: feature must be the slot .* starts 4 bytes after the slot"):
        ops.push(ring, ring.flatten()[1:7], 0)
    ops.push(ring, ring[0], 0)
    ops.push(ring, ring[1], 0)
    assert not ring.any()


def test_too_many_dimensions_are_refused() -> None:
    feature = torch.zeros(2**20).as_strided((2,) * 18, [2 * (18 - d) + 2 ** (18 - d) for d in range(18)])
    with pytest.raises(RuntimeError, match=r"lesa::predict: features must have at most 16 dimensions .* shape \(2,"):
        ops.predict([feature], torch.ones(1), torch.ones(1), torch.ones(1))


def _close(got: Tensor, want: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    assert bool(((got.double() - want).abs() <= tolerance.absolute + tolerance.relative * scale).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", COUNTS)
def test_gram_on_every_instruction_set(isa: str, count: int, size: int, dtype: torch.dtype) -> None:
    features = [_plain((size,), dtype) for _ in range(count)]
    wide = [feature.double() for feature in features]
    kind = torch.float32 if dtype.itemsize == 2 else dtype
    scale = reference.gram([feature.abs() for feature in wide])
    _close(ops.gram(features), reference.gram(wide), scale, kind)


@pytest.mark.parametrize("size", [1, 15, 1040, 4000])
def test_gram_of_features_whose_products_leave_the_range_of_float32(isa: str, size: int) -> None:
    features = extreme_features((size,), torch.bfloat16)
    assert_close_gram(ops.gram(features), features)


def test_gram_of_float32_features_is_summed_in_float64(isa: str) -> None:
    features = [torch.randn(5000) for _ in range(3)]
    torch.testing.assert_close(ops.gram(features), reference.gram(features), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [*range(1, 10), 64])
def test_predict_l1_on_every_instruction_set(isa: str, count: int, size: int, dtype: torch.dtype) -> None:
    history, target = [_plain((size,), dtype) for _ in range(count)], _plain((size,), dtype)
    kind = dtype if dtype == torch.float64 else torch.float32
    parameters = [_plain((length,), kind) for length in (count, 1, 1)]
    out = torch.full((size,), torch.nan, dtype=dtype)
    got = ops.predict_l1(history, target, *parameters, out)
    assert torch.equal(out, ops.predict(history, *parameters))
    wide = [tensor.double() for tensor in (*history, *parameters)]
    loss, *gradients = reference.predict_l1(wide[:count], target.double(), *wide[count:], None)
    _close(got[0], loss, loss + 1, kind)
    room = 1 + sum(parameter.abs().sum() for parameter in wide[count:])
    for gradient, want in zip(got[1:], gradients, strict=True):
        _close(gradient, want, want.abs() + room, kind)


def test_the_derivative_of_no_error_is_0_and_of_nan_is_nan(isa: str) -> None:
    history, one, zero = [torch.ones(40)], torch.ones(1), torch.zeros(1)
    exact = ops.predict_l1(history, history[0], zero, zero, one, None)
    assert [value.item() for value in exact] == [0, 0, 0, 0]
    target = history[0].clone()
    target[37] = torch.nan
    assert all(value.isnan() for value in ops.predict_l1(history, target, one, one, one, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", [0, 1, 3, 4])
@pytest.mark.parametrize("sizes", [(51, 33, 8, 9), (7, 3, 5, 1), (3, 2, 70, 4), (4, 0, 8, 2), (4, 3, 8, 0)], ids=str)
def test_kan_linear_on_every_instruction_set(isa: str, sizes: tuple[int, ...], order: int, dtype: torch.dtype) -> None:
    inputs, outputs, bases, rows = sizes
    kind = dtype if dtype == torch.float64 else torch.float32
    grid = 3 * torch.cumsum(torch.rand(inputs, bases + order + 1, dtype=kind) + 0.1, dim=1) / bases - 2
    weights = [_plain(shape, kind) for shape in [(outputs, inputs), (outputs, inputs, bases), (outputs, inputs)]]
    x, grad = _plain((rows, inputs), dtype), _plain((rows, outputs), dtype)
    got = [ops.kan_linear(x, grid, *weights), *ops.kan_linear_backward(grad, x, grid, *weights)]
    wide = [tensor.double() for tensor in (x, grid, *weights)]
    wants = [reference.kan_linear(*wide), *reference.kan_linear_backward(grad.double(), *wide)]
    for value, want, like in zip(got, wants, [x, x, *weights], strict=True):
        assert value.dtype == like.dtype and value.shape == want.shape
        if value.numel():
            _close(value, want, 20 * want.abs().max().expand_as(want), like.dtype)

"""forecast_norm and the ops on rings of int8 and float8, as the dispatcher serves them on each device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import COUNTS, DTYPES, assert_close, contiguous
from token_cases import (
    CHANNELS,
    SCALED_DTYPES,
    UNSCALED_DTYPES,
    check_norm,
    check_push,
    check_scaled_forecast,
    same_bits,
    scaled_ring,
)
from torch import Tensor

from lesa_kernels import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ops = torch.ops.lesa


def _chunks(batch: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and shift as models have them: parts of one embedding."""
    _, scale, shift = contiguous((batch, 3 * channels), dtype).chunk(3, dim=1)
    return scale, shift


def _expanded(batch: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return contiguous((batch, 1), dtype).expand(batch, channels), contiguous((channels,), dtype).expand(batch, channels)


def _transposed(batch: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return contiguous((channels, batch), dtype).t(), contiguous((batch, 2 * channels), dtype)[:, ::2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_forecast_norm_takes_any_number_of_channels(channels: int, dtype: torch.dtype) -> None:
    for write in ([], [1], [3]):
        check_norm(ops, (2, 3, channels), dtype, 3, write)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", [(1, 40), (3, 40), (2, 3, 5, 24), (0, 4, 8), (2, 0, 8), (300, 2, 67)], ids=str)
def test_forecast_norm_takes_any_shape(feature: tuple[int, ...], dtype: torch.dtype) -> None:
    check_norm(ops, feature, dtype, 4, [0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_forecast_norm_takes_1_to_64_features(count: int, dtype: torch.dtype) -> None:
    check_norm(ops, (2, 5, 131), dtype, count, [0], low=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("modulation", [_chunks, _expanded, _transposed], ids=lambda function: function.__name__)
def test_forecast_norm_takes_a_scale_and_shift_of_any_strides(
    modulation: Callable[..., Any], dtype: torch.dtype
) -> None:
    check_norm(ops, (3, 4, 67), dtype, 2, modulation=modulation(3, 67, dtype))
    check_norm(ops, (1, 4, 67), dtype, 2, modulation=modulation(1, 67, dtype))
    if dtype != torch.float64:
        check_norm(ops, (3, 4, 67), dtype, 2, modulation=modulation(3, 67, torch.float32))


def test_forecast_norm_is_the_norm_that_models_have() -> None:
    ring, (scale, shift) = torch.randn(2, 2, 9, 96), _chunks(2, 96, torch.float32)
    got = ops.forecast_norm(ring, torch.ones(1, 1), torch.zeros(1), [1], [], scale, shift, 1e-6)
    want = torch.nn.functional.layer_norm(ring[1], (96,), eps=1e-6) * (1 + scale)[:, None] + shift[:, None]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_the_variance_is_that_of_what_is_left_without_the_mean() -> None:
    """With a mean a thousand times the spread, the difference of two squares would leave no digit in float32."""
    ring, none = 1000 + torch.randn(1, 2, 50, 3072), torch.zeros(2, 3072)
    got = ops.forecast_norm(ring, torch.ones(1, 1), torch.zeros(1), [0], [], none, none, 0.0)
    want = ring[0].double() - ring[0].double().mean(-1, keepdim=True)
    want = want / want.square().mean(-1, keepdim=True).sqrt()
    assert (got - want).abs().max() < 1e-3


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_that_is_not_finite_spoils_the_norm_of_its_token_alone(dtype: torch.dtype, value: float) -> None:
    for position in (0, 66):
        ring, none = contiguous((2, 1, 5, 67), dtype), torch.zeros(1, 67, dtype=dtype)
        ring[1, 0, 3, position] = value
        arguments = torch.ones(1, 2, dtype=none.dtype), none[0, :1], [0, 1], [0], none, none, 1e-6
        got = ops.forecast_norm(ring, *arguments)
        assert torch.isnan(got[0, 3]).all() and got[0, [0, 1, 2, 4]].isfinite().all()
        assert (~ring[0].isfinite()).nonzero().tolist() == [[0, 3, position]]


@pytest.mark.parametrize("source", UNSCALED_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*((3, c) for c in CHANNELS), (5,), (2, 3, 4, 9), (0, 8), (3, 0), (0,)], ids=str)
def test_push_scaled_rounds_as_scale_rows_does(shape: tuple[int, ...], dtype: torch.dtype, source: torch.dtype) -> None:
    check_push(ops, contiguous(shape, source), dtype)


@pytest.mark.parametrize("source", UNSCALED_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
def test_push_scaled_of_what_is_not_finite_or_tiny(dtype: torch.dtype, source: torch.dtype) -> None:
    feature = contiguous((12, 67), source)
    feature[0, 3], feature[1, 66], feature[2, 0], feature[3] = torch.nan, torch.inf, -torch.inf, torch.nan
    feature[4], feature[4, 7] = torch.inf, torch.nan
    feature[5], feature[6], feature[6, 65] = 0, 0, torch.finfo(source).max
    if source != torch.float16:  # whose smallest number is 2^-24
        feature[7], feature[7, 9] = 0, 2.0**-100
        feature[8], feature[8, 9], feature[8, 1] = 0, 1.99 * 2.0**-101, -torch.finfo(source).tiny
        feature[9] = -torch.finfo(source).tiny / 2
    ring, scales = check_push(ops, feature, dtype)
    assert torch.isnan(scales[1]).nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
    assert not ring[1, :6].float().any() and not scales[1, 5]
    if source != torch.float16:
        assert ring[1, 7].float().nonzero().flatten().tolist() == [9] and scales[1, 7] > 0
        assert not ring[1, 8:10].float().any() and not scales[1, 8:10].any()


@pytest.mark.parametrize("out_dtype", UNSCALED_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
@pytest.mark.parametrize("channels", CHANNELS)
def test_forecast_scaled_takes_any_number_of_channels(
    channels: int, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    ring, scales = scaled_ring(6, (2, 3, channels), dtype)
    check_scaled_forecast(ops, ring, scales, out_dtype, [0, 2, 2, 4], [4, -1, 5, 0])


@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
@pytest.mark.parametrize("feature", [(40,), (0,), (0, 5), (5, 0), (2, 3, 4, 9), (300, 67)], ids=str)
def test_forecast_scaled_takes_any_shape(feature: tuple[int, ...], dtype: torch.dtype) -> None:
    ring, scales = scaled_ring(4, feature, dtype)
    check_scaled_forecast(ops, ring, scales, torch.bfloat16, [0, 1, 3], [3, -1])


@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
@pytest.mark.parametrize("rows", COUNTS)
@pytest.mark.parametrize("count", COUNTS)
def test_forecast_scaled_takes_1_to_64_features_and_rows(count: int, rows: int, dtype: torch.dtype) -> None:
    ring, scales = scaled_ring(70, (2, 131), dtype)
    read = torch.randint(70, (count,), device="cpu").tolist()
    write = torch.randperm(70, device="cpu")[:rows].tolist()
    write[0] = -1 if rows > 1 else write[0]
    check_scaled_forecast(ops, ring, scales, torch.float16, read, write, low=True)


@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
def test_what_is_kept_is_rounded_from_the_unrounded_forecast(dtype: torch.dtype) -> None:
    ring, scales = scaled_ring(6, (5, 1030), dtype)
    coefficients, offsets, kept = torch.randn(3, 4), torch.randn(3), []
    for out_dtype in UNSCALED_DTYPES:
        slots, slot_scales = ring.clone(), scales.clone()
        out = torch.empty(3, 5, 1030, dtype=out_dtype)
        ops.forecast_scaled_into(slots, slot_scales, out, coefficients, offsets, [0, 1, 2, 3], [0, -1, 3])
        kept.append((slots, slot_scales))
        if out_dtype == torch.float32:
            for m, slot in ((0, 0), (2, 3)):
                elements, row_scales = reference.scale_rows(out[m], dtype)
                assert same_bits(slots[slot], elements) and torch.equal(slot_scales[slot], row_scales)
    for slots, slot_scales in kept[1:]:
        assert same_bits(slots, kept[0][0]) and torch.equal(slot_scales, kept[0][1])


@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
def test_a_row_that_is_not_finite_stays_so_and_alone(dtype: torch.dtype) -> None:
    features = torch.randn(2, 4, 67)
    features[1, 2, 5] = torch.inf
    ring, scales = reference.scale_rows(features, dtype)
    out = torch.empty(2, 4, 67)
    ops.forecast_scaled_into(ring, scales, out, torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.ones(2), [0, 1], [1, -1])
    assert torch.isnan(out[:, 2]).all() and out[:, [0, 1, 3]].isfinite().all()
    assert torch.isnan(scales[1]).nonzero().flatten().tolist() == [2] and not ring[1, 2].float().any()


@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
def test_a_forecast_that_is_tiny_is_kept_as_zero(dtype: torch.dtype) -> None:
    ring, scales = scaled_ring(2, (3, 67), dtype)
    out = torch.empty(1, 3, 67)
    ops.forecast_scaled_into(ring, scales, out, torch.full((1, 1), 2.0**-110), torch.zeros(1), [0], [1])
    assert out.any() and not ring[1].float().any() and not scales[1].any()


def test_every_float8_number_is_read_exactly() -> None:
    ring = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).view(1, 256)
    out = torch.empty(1, 256)
    ops.forecast_scaled_into(ring, torch.ones(1), out, torch.ones(1, 1), torch.zeros(1), [0], [-1])
    nan = torch.isnan(ring[0].float())
    assert nan.sum() == 2 and torch.equal(torch.isnan(out[0]), nan)
    assert torch.equal(out[0][~nan], ring[0].float()[~nan])


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads, results = torch.get_num_threads(), []
    feature, parameters = contiguous((2, 701, 640), torch.bfloat16), (contiguous((1, 4), torch.float32), torch.ones(1))
    ring, modulation = contiguous((5, 2, 701, 640), torch.bfloat16), _chunks(2, 640, torch.bfloat16)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            torch.manual_seed(1)
            plain = ring.clone()
            result = [ops.forecast_norm(plain, *parameters, [0, 1, 2, 3], [2], *modulation, 1e-6), plain]
            for dtype in SCALED_DTYPES:
                slots, scales = scaled_ring(5, (2, 701, 640), dtype)
                out = torch.empty(2, 2, 701, 640, dtype=torch.bfloat16)
                coefficients = torch.linspace(-1, 1, 8).view(2, 4)
                ops.push_scaled(slots, scales, feature, 4)
                ops.forecast_scaled_into(slots, scales, out, coefficients, torch.ones(2), [0, 4, 1, 2], [4, 0])
                result += [slots, scales, out]
            results.append(result)
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(same_bits, result, results[0]))


def test_the_forecast_that_is_kept_is_that_of_forecast_into() -> None:
    ring, none = contiguous((4, 2, 5, 131), torch.bfloat16), torch.zeros(2, 131)
    plain, coefficients, offsets = ring.clone(), torch.randn(1, 3), torch.randn(1)
    ops.forecast_norm(ring, coefficients, offsets, [0, 2, 1], [2], none, none, 1e-6)
    ops.forecast_into(plain, coefficients, offsets, [0, 2, 1], [2])
    assert_close(ring, plain.double(), plain.double().abs(), torch.bfloat16)

"""The C++ kernels that take whole tokens, on every instruction set: sizes, conversions bit by bit, threads."""

from __future__ import annotations

import pytest
import torch
from cases import COUNTS, DTYPES, contiguous, offset
from cpu_library import facts, needs_library
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

pytestmark = [needs_library, pytest.mark.usefixtures("poisoned_memory")]
ops = torch.ops.lesa


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forecast_norm_on_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for channels in CHANNELS:
        check_norm(ops, (2, 3, channels), dtype, 3, [0])
    for count in COUNTS:
        check_norm(ops, (2, 131), dtype, count, low=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forecast_norm_of_an_address_that_is_no_multiple_of_a_vector(isa: str, dtype: torch.dtype) -> None:
    ring = offset((3, 2, 5, 77), dtype)
    plain, parameters = (
        ring.clone(),
        (torch.ones(1, 2), torch.ones(1), [0, 1], [1], torch.ones(2, 77), torch.ones(2, 77)),
    )
    assert same_bits(ops.forecast_norm(ring, *parameters, 0.1), ops.forecast_norm(plain, *parameters, 0.1))
    assert same_bits(ring, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kept_forecast_has_the_bits_of_forecast_into(isa: str, dtype: torch.dtype) -> None:
    for channels in CHANNELS:
        ring, none = contiguous((4, 2, channels), dtype), torch.zeros(2, channels)
        plain, coefficients, offsets = ring.clone(), torch.randn(1, 3), torch.randn(1)
        ops.forecast_norm(ring, coefficients, offsets, [0, 2, 1], [2], none, none, 1e-6)
        ops.forecast_into(plain.view(4, -1), coefficients, offsets, [0, 2, 1], [2])
        assert same_bits(ring, plain)


@pytest.mark.parametrize("source", UNSCALED_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
def test_push_scaled_on_every_instruction_set(isa: str, dtype: torch.dtype, source: torch.dtype) -> None:
    for channels in [0, *CHANNELS]:
        feature = contiguous((4, channels), source)
        if channels > 1:
            feature[1, -1], feature[2, 0], feature[3] = torch.nan, -torch.inf, 0
        check_push(ops, feature, dtype)


@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
def test_a_value_that_is_not_finite_is_found_wherever_it_is(isa: str, dtype: torch.dtype) -> None:
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
        check_push(ops, torch.ones(131, 131).fill_diagonal_(value), dtype)


@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
def test_rounding_to_a_scaled_ring_is_to_nearest_even_everywhere(isa: str, dtype: torch.dtype) -> None:
    """The largest value is the limit, so that the others are rounded as they are."""
    limit = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}[dtype]
    exact = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).float()
    exact = exact[exact.abs() <= limit].sort().values
    half_way = (exact[1:] + exact[:-1]) / 2
    near = [torch.nextafter(half_way, torch.tensor(end)) for end in (torch.inf, -torch.inf)]
    values = torch.cat([exact, half_way, *near, torch.linspace(-limit, limit, 99991), torch.randn(9973) * 2.0**-8])
    ring, scales = check_push(ops, values, dtype)
    assert scales[1] == 1
    want = values.round().to(dtype) if dtype == torch.int8 else values.to(dtype)
    assert same_bits(ring[1], want)


@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
def test_every_scaled_number_is_read_exactly(isa: str, dtype: torch.dtype) -> None:
    ring = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).view(1, 256)
    out = torch.empty(1, 256)
    ops.forecast_scaled_into(ring, torch.full((1,), 0.75), out, torch.ones(1, 1), torch.zeros(1), [0], [-1])
    want = ring[0].float() * 0.75
    nan = torch.isnan(want)
    assert torch.equal(torch.isnan(out[0]), nan) and torch.equal(out[0][~nan], want[~nan])


@pytest.mark.parametrize("out_dtype", UNSCALED_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
def test_forecast_scaled_on_every_instruction_set(isa: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    for channels in CHANNELS:
        check_scaled_forecast(ops, *scaled_ring(5, (3, channels), dtype), out_dtype, [0, 2, 2], [2, -1, 0])
    for rows in [*range(1, 10), 17, 64]:
        write = [-1 if m % 3 == 1 else m for m in range(rows)]
        check_scaled_forecast(ops, *scaled_ring(64, (2, 131), dtype), out_dtype, [0, 5, 63, 5], write, low=True)
    for count in COUNTS:
        check_scaled_forecast(ops, *scaled_ring(64, (131,), dtype), out_dtype, list(range(count)), [1, 0])


@pytest.mark.parametrize("out_dtype", UNSCALED_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", SCALED_DTYPES, ids=str)
def test_large_outputs_go_past_the_cache_and_are_the_same(isa: str, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    coefficients, offsets = torch.randn(64, 2), torch.randn(64)
    for tokens, channels in ((41, 837), (8, 2048)):
        many = facts()["past_cache_bytes"] // (64 * tokens * channels * out_dtype.itemsize) + 1
        ring, scales = scaled_ring(2, (tokens, channels), dtype)
        large = torch.empty(64, many, tokens, channels, dtype=out_dtype)
        small = torch.empty(64, tokens, channels, dtype=out_dtype)
        stacked, stacked_scales = _repeated(ring, many), _repeated(scales, many)
        ops.forecast_scaled_into(stacked, stacked_scales, large, coefficients, offsets, [0, 1], [-1] * 64)
        ops.forecast_scaled_into(ring, scales, small, coefficients, offsets, [0, 1], [-1] * 64)
        assert torch.equal(large, small.unsqueeze(1).expand(large.shape))


def _repeated(slots: Tensor, times: int) -> Tensor:
    return slots.unsqueeze(1).expand(-1, times, *slots.shape[1:]).contiguous()


def test_the_number_of_threads_changes_no_bit(isa: str, threads: None) -> None:
    ring, modulation = contiguous((4, 3, 501, 645), torch.float16), contiguous((2, 3, 645), torch.float16)
    slots = {dtype: scaled_ring(4, (1501, 645), dtype) for dtype in SCALED_DTYPES}
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        plain = ring.clone()
        norm = ops.forecast_norm(plain, torch.ones(1, 3), torch.ones(1), [0, 1, 2], [1], *modulation, 1e-6)
        result = [norm, plain]
        for elements, scales in slots.values():
            kept, kept_scales, out = elements.clone(), scales.clone(), torch.empty(2, 1501, 645)
            ops.push_scaled(kept, kept_scales, out.copy_(elements[:2].float())[0], 3)
            ops.forecast_scaled_into(kept, kept_scales, out, torch.ones(2, 3), torch.ones(2), [0, 3, 1], [1, 3])
            result += [kept, kept_scales, out]
        results.append(result)
    for other in results[1:]:
        assert all(map(same_bits, other, results[0]))

"""forecast_norm, as the dispatcher serves it on each device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import COUNTS, DTYPES, assert_close, contiguous
from token_cases import CHANNELS, check_norm, same_bits
from torch import Tensor

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


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    threads, results = torch.get_num_threads(), []
    parameters = contiguous((1, 4), torch.float32), torch.ones(1)
    ring, modulation = contiguous((5, 2, 701, 640), torch.bfloat16), _chunks(2, 640, torch.bfloat16)
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            plain = ring.clone()
            result = [ops.forecast_norm(plain, *parameters, [0, 1, 2, 3], [2], *modulation, 1e-6), plain]
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

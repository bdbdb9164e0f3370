"""The C++ kernel that takes whole tokens, on every instruction set: sizes, addresses, threads."""

from __future__ import annotations

import pytest
import torch
from cases import COUNTS, DTYPES, contiguous, offset
from cpu_library import needs_library
from token_cases import CHANNELS, check_norm, same_bits

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


def test_the_number_of_threads_changes_no_bit(isa: str, threads: None) -> None:
    ring, modulation = contiguous((4, 3, 501, 645), torch.float16), contiguous((2, 3, 645), torch.float16)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        plain = ring.clone()
        norm = ops.forecast_norm(plain, torch.ones(1, 3), torch.ones(1), [0, 1, 2], [1], *modulation, 1e-6)
        results.append([norm, plain])
    for other in results[1:]:
        assert all(map(same_bits, other, results[0]))

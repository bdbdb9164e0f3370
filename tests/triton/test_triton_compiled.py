"""What Triton's compiler makes of the kernels for sm_90: vectors, registers, one compilation for all steps."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import triton
from triton_engines import Compiled, driver, simulator

K = 8
N = 2048
LOAD, STORE = r"ld\.global\.v4\.b32", r"st\.global\.v4\.b32"
LOAD_8_BYTES = r"ld\.global\.v2\.b32"
# Sixteen warps on each multiprocessor of 65536 registers.
MOST_REGISTERS = 128
# The assembler of Triton 3.6 leaves four numbers out of the registers, to let 12 warps run at a time.
MOST_STACK_OF_16 = 16 if triton.__version__.startswith("3.6.") else 0


@pytest.fixture
def lesa() -> Iterator[ModuleType]:
    with simulator() as package:
        yield package


def _features(count: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(N).to(dtype) for _ in range(count)]


def _parameters(count: int) -> list[torch.Tensor]:
    return [torch.randn(count), torch.randn(1), torch.randn(1)]


def _assert_lean(compiled: Compiled, loads: int, stores: int) -> None:
    assert (compiled.count(LOAD), compiled.count(STORE)) == (loads, stores)
    # What is left are parameters and partial sums: single floats, never features.
    assert compiled.count(r"(ld|st)\.global\.(v\d\.)?b16") == 0
    resources = compiled.resources()
    assert resources["STACK"] == 0 and resources["LOCAL"] == 0
    assert resources["REG"] <= MOST_REGISTERS


@pytest.mark.parametrize(("dtype", "vectors"), [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 2)], ids=str)
def test_predict_and_forecast_move_16_bytes_at_a_time(lesa: ModuleType, dtype: torch.dtype, vectors: int) -> None:
    history = _features(K, dtype)
    lesa.predict(history, *_parameters(K))
    lesa.forecast(history, torch.randn(6, K), torch.randn(6))
    ring = torch.randn(9, N).to(dtype)
    lesa.forecast_into(ring, torch.randn(6, K), torch.randn(6), range(K), range(2, 8))
    predict, forecast, forecast_into = driver().launches
    # Of the outputs, a loop writes one after the other.
    for compiled in (predict, forecast, forecast_into):
        _assert_lean(compiled, vectors * K, vectors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_reductions_move_16_bytes_at_a_time(lesa: ModuleType, dtype: torch.dtype) -> None:
    history, target = _features(K, dtype), _features(1, dtype)[0]
    lesa.predict_l1(history, target, *_parameters(K), torch.empty_like(target))
    lesa.predict_backward(target, history, *_parameters(K), False)
    l1, finish, backward, _ = driver().launches
    _assert_lean(l1, K + 1, 1)
    _assert_lean(backward, K + 1, 0)
    assert finish.resources()["STACK"] == 0


@pytest.mark.parametrize(("count", "load"), [(8, LOAD), (9, LOAD_8_BYTES), (12, LOAD_8_BYTES)])
def test_gram_loads_each_vector_once(lesa: ModuleType, count: int, load: str) -> None:
    lesa.gram(_features(count, torch.bfloat16))
    products, matrix = driver().launches
    assert products.count(load) == count and products.count(r"ld\.global\.(v\d\.)?b16") == 0
    assert products.resources()["REG"] <= MOST_REGISTERS
    assert all(compiled.resources()["STACK"] == 0 for compiled in (products, matrix))


@pytest.mark.parametrize("size", [N, 131])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_products_of_16_features_stay_in_registers(lesa: ModuleType, dtype: torch.dtype, size: int) -> None:
    lesa.gram([torch.randn(size).to(dtype) for _ in range(16)])
    assert all(compiled.resources()["STACK"] <= MOST_STACK_OF_16 for compiled in driver().launches)


def test_kan_layers_stay_in_registers(lesa: ModuleType) -> None:
    layer = [torch.randn(2, 51), torch.randn(51, 12).sort(1).values, torch.randn(4, 51), torch.randn(4, 51, 8)]
    scaler = torch.randn(4, 51)
    lesa.kan_linear(*layer, scaler)
    lesa.kan_linear_backward(torch.randn(2, 4), *layer, scaler)
    assert len(driver().launches) == 3
    for compiled in driver().launches:
        assert compiled.resources()["STACK"] == 0 and compiled.resources()["REG"] <= MOST_REGISTERS


def test_one_kernel_serves_all_counts_of_forecasts_up_to_8_and_one_up_to_16(lesa: ModuleType) -> None:
    ring, history = torch.randn(20, 64), [torch.randn(64) for _ in range(3)]
    before = driver().compilations
    for most, counts in ((8, range(2, 9)), (16, range(9, 17))):
        for rows in (most, *counts):
            matrix, offsets = torch.randn(rows, 3), torch.randn(rows)
            lesa.forecast(history, matrix, offsets)
            lesa.forecast_into(ring, matrix, offsets, [2, 3, 4], range(rows))
    assert driver().compilations <= before + 4


@pytest.mark.parametrize("size", [64, 63])
def test_no_slot_number_compiles_anew(lesa: ModuleType, size: int) -> None:
    ring, matrix, offsets = torch.randn(40, size), torch.randn(2, 3), torch.randn(2)
    lesa.forecast_into(ring, matrix, offsets, [2, 3, 4], [5, 6])
    lesa.push(ring, ring[0].clone(), 3)
    before = driver().compilations
    for read, write in [([0, 1, 2], [16, 32]), ([16, 15, 0], [1, 0]), ([7, 7, 7], [7, 39])]:
        lesa.forecast_into(ring, matrix, offsets, read, write)
    for slot in (0, 1, 16, 39):
        lesa.push(ring, ring[2].clone(), slot)
    assert driver().compilations == before


def test_the_order_of_a_history_and_its_values_do_not_compile_anew(lesa: ModuleType) -> None:
    history, parameters = _features(3, torch.bfloat16), _parameters(3)
    lesa.predict(history, *parameters)
    before = driver().compilations
    lesa.predict(history[::-1], *(2 * parameter for parameter in parameters))
    assert driver().compilations == before


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_most_inputs_and_outputs_stay_in_registers(lesa: ModuleType, dtype: torch.dtype) -> None:
    history = [torch.randn(131).to(dtype) for _ in range(64)]
    lesa.forecast(history, torch.randn(64, 64), torch.randn(64))
    lesa.predict_l1(history, history[0], *_parameters(64), None)
    for compiled in driver().launches:
        assert compiled.resources()["STACK"] == 0

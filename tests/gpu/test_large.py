"""More than 2^31 elements in one tensor: addresses that do not fit into 32 bits, for every op."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_inputs import assert_close
from torch import Tensor

from lesa_kernels.ops import reference

DEVICE = torch.device("cuda")
N = 2**31 + 1003
CHUNK = 2**26
NEEDED_GB = 40
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def _enough_memory() -> Iterator[None]:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(DEVICE)[0] / 1e9
    if free < NEEDED_GB:
        pytest.skip(f"{NEEDED_GB} GB of free GPU memory are needed, {free:.0f} are there")
    yield
    torch.cuda.empty_cache()


def _random(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE).normal_()


def _windows(length: int) -> list[slice]:
    """The beginning, both sides of every power of two from 2^28 on, and the end."""
    middles = [power for power in (2**28, 2**29, 2**30, 2**31) if power < length]
    return [slice(0, 1000), *(slice(m - 1000, m + 1000) for m in middles), slice(length - 1000, length)]


def _chunks() -> Iterator[slice]:
    for start in range(0, N, CHUNK):
        yield slice(start, min(start + CHUNK, N))


def _parameters(count: int) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE) for shape in ((count,), (1,), ())]


def _check_rows(outputs: list[Tensor], features: list[Tensor], matrix: Tensor, offsets: Tensor) -> None:
    for window in _windows(N):
        parts = [feature[window].double() for feature in features]
        want = reference.forecast(parts, matrix.double(), offsets.double())
        scale = reference.forecast([part.abs() for part in parts], matrix.double().abs(), offsets.double().abs())
        for output, row, size in zip(outputs, want, scale, strict=True):
            assert_close(output[window], row, size, DTYPE)


def test_predict(ops: Any) -> None:
    history, (weight, bias, gain) = [_random(N), _random(N)], _parameters(2)
    row = gain * weight
    row[-1] += 1
    _check_rows([ops.predict(history, weight, bias, gain)], history, row[None], gain * bias)


def test_forecast(ops: Any) -> None:
    history, matrix, offsets = [_random(N), _random(N)], *(torch.randn(s, device=DEVICE) for s in ((2, 2), (2,)))
    _check_rows(ops.forecast(history, matrix, offsets), history, matrix, offsets)


def test_forecast_into(ops: Any) -> None:
    ring, matrix, offsets = _random(3, N), *(torch.randn(s, device=DEVICE) for s in ((1, 2), (1,)))
    ops.forecast_into(ring, matrix, offsets, [1, 0], [2])
    _check_rows([ring[2]], [ring[1], ring[0]], matrix, offsets)


def test_push(ops: Any) -> None:
    ring, feature = torch.zeros(3, N, dtype=DTYPE, device=DEVICE), _random(N)
    ops.push(ring, feature, 2)
    assert torch.equal(ring[2], feature) and not ring[:2].any()


def test_predict_backward(ops: Any) -> None:
    (grad, *history), parameters = [_random(N) for _ in range(3)], _parameters(2)
    (first, second), *got = ops.predict_backward(grad, history, *parameters, True)
    want, scale = [0.0] * 3, [0.0] * 3
    for chunk in _chunks():
        parts = [tensor[chunk].float() for tensor in (grad, *history)]
        wanted, sizes = _sums(parts, parameters), _sums([p.abs() for p in parts], [p.abs() for p in parameters])
        want, scale = (
            [a + b for a, b in zip(want, wanted, strict=True)],
            [a + b for a, b in zip(scale, sizes, strict=True)],
        )
    for value, wanted_sum, size in zip(got, want, scale, strict=True):
        assert_close(value, wanted_sum, size, torch.float32)
    weight, _, gain = parameters
    _check_rows([first, second], [grad], torch.stack([gain * weight[0], gain * weight[1] + 1])[:, None], 0 * weight)


def _sums(parts: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """The gradients of weight, bias and gain over a chunk, float64."""
    return list(reference.predict_backward(parts[0].double(), [p.double() for p in parts[1:]],
                                           *(p.double() for p in parameters), False)[1:])  # fmt: skip


def test_predict_l1(ops: Any) -> None:
    (target, *history), parameters = [_random(N) for _ in range(3)], _parameters(2)
    out = torch.empty_like(target)
    got = ops.predict_l1(history, target, *parameters, out)
    want = [0.0] * 4
    for chunk in _chunks():
        part = [tensor[chunk].double() for tensor in (target, *history)]
        means = reference.predict_l1(part[1:], part[0], *(p.double() for p in parameters), None)
        share = part[0].numel() / N
        want = [total + share * mean for total, mean in zip(want, means, strict=True)]
    for value, wanted in zip(got, want, strict=True):
        assert_close(value, wanted, wanted.abs() + 1, torch.float32)
    weight, bias, gain = parameters
    row = gain * weight
    row[-1] += 1
    _check_rows([out], history, row[None], gain * bias)


def test_gram(ops: Any) -> None:
    features = [_random(N) for _ in range(3)]
    want, scale = torch.zeros(2, 4, 4, dtype=torch.float64, device=DEVICE)
    for chunk in _chunks():
        parts = [feature[chunk].double() for feature in features]
        want += reference.gram(parts)
        scale += reference.gram([part.abs() for part in parts])
    assert_close(ops.gram(features), want, scale, torch.float32)


def _layer(inputs: int) -> list[Tensor]:
    """Grid, base weight, spline weight and scaler of a layer with one output."""
    grid = (1.2 * torch.arange(-3, 9, device=DEVICE) - 3).to(DTYPE).expand(inputs, 12).contiguous()
    return [grid, _random(1, inputs), _random(1, inputs, 8), _random(1, inputs)]


def test_kan_linear_of_many_rows(ops: Any) -> None:
    rows = N // 8 + 1
    x, layer = _random(rows, 8), _layer(8)
    got = ops.kan_linear(x, *layer)
    for window in _windows(rows):
        want = reference.kan_linear(x[window].double(), *(tensor.double() for tensor in layer))
        assert_close(got[window], want, want.abs().max().expand_as(want) * 10, DTYPE)


def test_kan_linear_and_its_backward_with_many_weights(ops: Any) -> None:
    inputs = N // 8 + 1
    x, layer = _random(1, inputs), _layer(inputs)
    assert layer[2].numel() > 2**31
    out, grad = ops.kan_linear(x, *layer), _random(1, 1)
    grads = ops.kan_linear_backward(grad, x, *layer)
    total, scale = torch.zeros(2, 1, 1, dtype=torch.float64, device=DEVICE)
    for start in range(0, inputs, CHUNK // 8):
        part = slice(start, min(start + CHUNK // 8, inputs))
        arguments = [tensor.double() for tensor in _cut(x, layer, part)]
        total = total + reference.kan_linear(*arguments)
        scale = scale + reference.kan_linear(*arguments[:2], *(tensor.abs() for tensor in arguments[2:])).abs()
    assert_close(out, total, 10 * scale, DTYPE)
    for part in _windows(inputs):
        want = reference.kan_linear_backward(grad.double(), *(tensor.double() for tensor in _cut(x, layer, part)))
        got = (grads[0][:, part], grads[1][:, part], grads[2][:, part], grads[3][:, part])
        for value, wanted in zip(got, want, strict=True):
            assert_close(value, wanted, wanted.abs().max().expand_as(wanted) * 10, DTYPE)


def _cut(x: Tensor, layer: list[Tensor], part: slice) -> list[Tensor]:
    """The arguments of the layer that has only a part of the inputs."""
    grid, base, spline, scaler = layer
    return [x[:, part], grid[part], base[:, part], spline[:, part], scaler[:, part]]

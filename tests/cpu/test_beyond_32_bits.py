"""Features of more than 2^31 bytes and elements on the CPU: places that do not fit into 32 bits, for every op.

Memory that is only read stays pages of zeros, which take none, but for windows of numbers at the ends and around powers
of two; what is written takes 2 to 5 GiB.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from lesa_kernels.ops import reference

ops = torch.ops.lesa
DTYPE = torch.bfloat16
N = 2**31 + 5003
NEEDED = 6 * 2**30


@pytest.fixture(autouse=True)
def _enough_memory() -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free < NEEDED:
        pytest.skip(f"{NEEDED / 2**30:.0f} GiB of free memory are needed, {free / 2**30:.1f} are there")


def _windows(length: int) -> Iterator[slice]:
    """The beginning, both sides of powers of two, and the end."""
    yield slice(0, 1000)
    yield from (slice(power - 1000, power + 1000) for power in (2**29, 2**30, 2**31) if power + 1000 < length)
    yield slice(length - 1000, length)


def _sparse(*shape: int) -> Tensor:
    """Zeros, but for the windows along the last dimension. NumPy takes memory for zeros when they are written to."""
    tensor = torch.from_numpy(np.zeros(shape, np.int16)).view(DTYPE)
    for row in tensor.view(-1, shape[-1]):
        for window in _windows(shape[-1]):
            row[window] = torch.randn(row[window].shape).to(DTYPE)
    return tensor


def _parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Windows of tensors, in one piece each, float64."""
    return [torch.cat([tensor[window] for window in _windows(len(tensor))]).double() for tensor in tensors]


def _check(got: Tensor, want: Tensor) -> None:
    """Compare windows of a result with float64, and look at a stretch that is none."""
    torch.testing.assert_close(_parts([got])[0], want, rtol=8e-3, atol=8e-3)
    assert got[2**28 : 2**28 + 1000].unique().numel() == 1


def _predict_l1(elements: int) -> None:
    history, target = [_sparse(elements)], _sparse(elements)
    parameters = torch.full((1,), 0.5), torch.zeros(1), torch.ones(1)
    loss, *gradients = ops.predict_l1(history, target, *parameters, None)
    want_loss, *wants = reference.predict_l1(
        _parts(history), _parts([target])[0], *(p.double() for p in parameters), None
    )
    share = len(_parts([target])[0]) / elements
    torch.testing.assert_close(loss.double(), want_loss * share, rtol=1e-4, atol=0)
    for gradient, want in zip(gradients, wants, strict=True):
        torch.testing.assert_close(gradient.double(), want * share, rtol=1e-4, atol=1e-12)


def test_predict_l1_of_more_than_2_gib() -> None:
    _predict_l1(2**30 + 5003)


@pytest.mark.exhaustive
class TestBeyond31Bits:
    def test_predict_l1(self) -> None:
        _predict_l1(N)

    def test_gram(self) -> None:
        features = [_sparse(N) for _ in range(2)]
        want = reference.gram(_parts(features))
        want[2, 2] = N
        torch.testing.assert_close(ops.gram(features), want, rtol=1e-5, atol=1e-3)

    def test_predict_and_identity(self) -> None:
        history = [_sparse(N) for _ in range(2)]
        parameters = torch.randn(2), torch.ones(1), torch.ones(1)
        _check(ops.predict(history, *parameters), reference.predict(_parts(history), *(p.double() for p in parameters)))
        _check(ops.identity(history[0]), _parts(history)[0])

    def test_predict_backward(self) -> None:
        grad, one = _sparse(N), torch.ones(1)
        (of_history,), of_weight, of_bias, of_gain = ops.predict_backward(grad, [grad], one, one, one, True)
        part = _parts([grad])
        (want,), *wants = reference.predict_backward(part[0], part, *[one.double()] * 3, True)
        _check(of_history, want)
        for got, sums in zip((of_weight, of_bias, of_gain), wants, strict=True):
            torch.testing.assert_close(got.double(), sums, rtol=1e-4, atol=1e-3)

    def test_forecast(self) -> None:
        history = [_sparse(2**30 + 5003) for _ in range(2)]
        rows, offsets = torch.randn(2, 2), torch.randn(2)
        wants = reference.forecast(_parts(history), rows.double(), offsets.double())
        for got, want in zip(ops.forecast(history, rows, offsets), wants, strict=True):
            _check(got, want)

    def test_a_ring(self) -> None:
        ring = _sparse(3, 2**30 + 5003)
        parts = _parts(ring.unbind())
        ops.push(ring, ring[0], 2)
        _check(ring[2], parts[0])
        rows, offsets = torch.randn(1, 3), torch.randn(1)
        ops.forecast_into(ring, rows, offsets, [0, 1, 2], [1])
        _check(ring[1], reference.forecast([parts[0], parts[1], parts[0]], rows.double(), offsets.double())[0])
        _check(ring[0], parts[0])

    def test_kan_linear_and_its_backward(self) -> None:
        """Weights of more than 2^31 bytes."""
        inputs, outputs = 2**15, 2**11 + 3
        grid = torch.linspace(-6.6, 6.6, 12).expand(inputs, 12)
        spline, scaler = torch.from_numpy(np.zeros((outputs, inputs, 8), np.float32)), torch.ones(outputs, inputs)
        spline[-1] = torch.randn(inputs, 8)
        x, base = torch.randn(1, inputs), torch.zeros(outputs, inputs)
        got = ops.kan_linear(x, grid, base, spline, scaler)
        last = x.double(), grid.double(), base[-1:].double(), spline[-1:].double(), scaler[-1:].double()
        torch.testing.assert_close(got[:, -1:].double(), reference.kan_linear(*last), rtol=1e-3, atol=1e-3)
        assert not got[:, :-1].any()
        grad = torch.zeros(1, outputs)
        grad[0, -1] = 1
        of_x, _, of_spline, _ = ops.kan_linear_backward(grad, x, grid, base, spline, scaler)
        want_x, _, want_spline, _ = reference.kan_linear_backward(grad[:, -1:].double(), *last)
        torch.testing.assert_close(of_x.double(), want_x, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(of_spline[-1:].double(), want_spline, rtol=1e-3, atol=1e-3)
        assert not of_spline[:-1].any()

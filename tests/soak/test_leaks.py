"""Memory over time: a million calls of the ops and ten thousand sampling runs leave no more of it in use than a few."""

from __future__ import annotations

import itertools
import mmap
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lesa_kernels as lesa

ops = torch.ops.lesa
MIB = 2**20
# Allocators hold memory in pieces; this is three bytes a call of a million.
MOST_GROWTH = 2 * MIB


def resident() -> int:
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def growth(work: Callable[[], object], times: int, what: str) -> float:
    """Repeat work and return by how many bytes memory grew, from the first quarter's median to the last one's."""
    for _ in range(times // 10):
        work()
    began, samples = time.monotonic(), []
    for _ in range(40):
        for _ in range(times // 40):
            work()
        samples.append(resident())
    quarters = [statistics.median(samples[start : start + 10]) for start in range(0, 40, 10)]
    told = ", ".join(f"{quarter / MIB:.2f}" for quarter in quarters)
    print(f"\n{times:,} {what} in {time.monotonic() - began:.1f} s, resident memory in MiB by quarters: {told}")
    return quarters[-1] - quarters[0]


def op_calls() -> list[Callable[[], object]]:
    """Small calls of every op, with and without gradients, and some that are refused."""
    history = [torch.randn(3, 40) for _ in range(4)]
    parameters = torch.randn(4), torch.randn(1), torch.randn(1)
    wanted = [each.clone().requires_grad_() for each in parameters]
    rows, offsets = torch.randn(2, 3), torch.randn(2)
    ring = torch.randn(5, 3, 40)
    x, grid = torch.rand(6, 3), torch.arange(12.0).expand(3, 12).contiguous() / 4 - 1
    layer = torch.randn(4, 3), torch.randn(4, 3, 8), torch.randn(4, 3)

    def backward(output: Tensor, inputs: Sequence[Tensor]) -> object:
        return torch.autograd.grad(output.sum(), inputs)

    def refused(name: str, *arguments: Any) -> Callable[[], object]:
        def call() -> None:
            with suppress(RuntimeError):
                getattr(ops, name)(*arguments)
                raise AssertionError(f"{name} was not refused")

        return call

    return [
        lambda: ops.predict(history, *parameters),
        lambda: backward(ops.predict(history, *wanted), wanted),
        lambda: ops.predict_backward(history[0], history, *parameters, True),
        lambda: ops.predict_l1(history, history[0], *parameters, None),
        lambda: ops.forecast(history[:3], rows, offsets),
        lambda: ops.forecast_into(ring, rows, offsets, [0, 1, 2], [3, 4]),
        lambda: ops.push(ring, history[0], 1),
        lambda: ops.gram(history),
        lambda: ops.kan_linear(x, grid, *layer),
        lambda: ops.kan_linear_backward(x.new_ones(6, 4), x, grid, *layer),
        refused("predict", history[:3], *parameters),
        refused("push", ring, history[0].double()[:2], 0),
        refused("forecast_into", ring, rows, offsets, [0, 1, 9], [3, 4]),
    ]


class SmallModel(nn.Module):
    """A transformer's outline: blocks, and what follows them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.norm_out = nn.LayerNorm(8)

    def forward(self, latents: Tensor) -> Tensor:
        for block in self.blocks:
            latents = latents + block(latents)
        return self.norm_out(latents)


STEPS = 8
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
OPTIONS: list[dict[str, Any]] = [{}, {"chunk": 1}, {"check_every": 1}, {"history_dtype": torch.bfloat16}]


def sampling_runs() -> Callable[[], object]:
    """A run, each time with other options or latents; every tenth is broken off, every seventh changes its latents."""
    model, numbers = SmallModel(), itertools.count()
    schedule = lesa.Schedule.explicit(STEPS, (0, 1, 4))

    @torch.no_grad()
    def run() -> None:
        number = next(numbers)
        if number % 50 == 0:
            lesa.enable(model, lesa.TaylorSeer(1), schedule, sigmas=SIGMAS, **OPTIONS[number // 50 % len(OPTIONS)])
        latents = torch.randn(1, 4 + number % 3, 8)
        for step in range(STEPS):
            if number % 10 == 3 and step == 5:
                break
            if number % 7 == 6 and step == 6:
                latents = latents[:, :2]
            latents = latents - model(latents) / STEPS

    return run


def repeated(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """One of the calls after the other."""
    turn = itertools.cycle(calls)
    return lambda: next(turn)()


@pytest.mark.parametrize("times", [8_000, pytest.param(1_000_000, marks=pytest.mark.exhaustive)])
@pytest.mark.usefixtures("one_thread")
def test_calls_of_the_ops_leave_nothing(times: int) -> None:
    assert growth(repeated(op_calls()), times, "calls of the ops") < MOST_GROWTH


@pytest.mark.parametrize("times", [400, pytest.param(10_000, marks=pytest.mark.exhaustive)])
@pytest.mark.usefixtures("one_thread")
def test_sampling_runs_leave_nothing(times: int) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra: diffusers)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lesa.LesaWarning)
        assert growth(sampling_runs(), times, "sampling runs") < MOST_GROWTH


def test_a_leak_is_found() -> None:
    kept: list[mmap.mmap] = []

    def leak() -> None:
        # Memory of its own: what a process has freed before would take in smaller leaks.
        kept.append(mmap.mmap(-1, 4096))
        kept[-1][0] = 1

    assert growth(leak, 4_000, "leaks of 4096 bytes") > MOST_GROWTH

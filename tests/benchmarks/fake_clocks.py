"""Clocks and cases whose times are known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness, results
from benchmarks.clock import CpuClock, Run

ORIGIN = results.Origin("a device", 1, "2.13", "", "abc", "2026-01-01", "test")


class SmallCache(CpuClock):
    def cache_bytes(self) -> int:
        return 1


class Scripted(SmallCache):
    """A call takes as many seconds as its name says; what was asked for is written down."""

    sample_seconds = 8.0

    def __init__(self) -> None:
        self.asked: list[int] = []

    def sample(self, run: Run, first: int, calls: int, sets: int = 1) -> float:
        self.asked.append(calls)
        return float(run(first)[0].view(-1)[0])


class WithGraphs(Scripted):
    """Has graphs, which take a tenth of the time a call, and a host that needs a second to launch."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[tuple[int, int]] = []

    def capture(self, run: Run, sets: int, calls: int) -> Run | None:
        self.captured.append((sets, calls))
        return lambda turn: [output * calls / 10 for output in run(0)]

    def host_seconds(self, run: Run) -> float | None:
        return 1.0


def case_of(value: float, *variants: harness.Variant) -> harness.Case:
    return harness.Case("predict", "4", 16, [torch.full((4,), value)], [torch.ones(())], variants)


class FakeCuda:
    """Stands for the parts of `torch.cuda` that a clock uses: an event knows how many calls came before it."""

    def __init__(self) -> None:
        self.calls = 0
        self.replays = 0
        self.current: object = SimpleNamespace(wait_stream=lambda other: None)

    def run(self, turn: int) -> list[torch.Tensor]:
        self.calls += 1
        return [torch.full((1000,), float(turn))]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0

            def record(inner) -> None:
                inner.at = self.calls

            def synchronize(self) -> None: ...

            def elapsed_time(self, other: Event) -> float:
                return 2.0 * (other.at - self.at)

        class Graph:
            def replay(inner) -> None:
                self.replays += 1

        @contextmanager
        def stream(chosen: object) -> Iterator[None]:
            before, self.current = self.current, chosen
            try:
                yield
            finally:
                self.current = before

        @contextmanager
        def graph(_: Graph, stream: object) -> Iterator[None]:
            before, self.current = self.current, stream
            yield  # an error passes the next line, as it does in torch
            self.current = before

        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda device: self.current,
            "stream": stream,
            "graph": graph,
            "synchronize": lambda device: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

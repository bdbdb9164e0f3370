"""Times calls on a device, and reads the facts of the device that a measurement needs."""

from __future__ import annotations

import os
import re
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

MEBIBYTE = 2**20
HOST_SECONDS = 0.25  # what is slower on the device than this needs no exact time of its launch

Run = Callable[[int], Sequence[Tensor]]
"""Computes the outputs of input set i."""


class Clock(Protocol):
    """Times calls on one device.

    Args:
        device: what it times.
        sample_seconds: how long one sample should last: short calls are repeated within it.
        warm_seconds: how long to run before the first sample counts.
    """

    device: torch.device
    sample_seconds: float
    warm_seconds: float

    def sample(self, run: Run, first: int, calls: int, sets: int = 1) -> float:
        """Return the mean seconds of a call, over `calls` calls in a row with input sets from `first` on.

        Where an allocator would hand out the same memory again, the outputs of `sets` calls are kept.
        """

    def capture(self, run: Run, sets: int, calls: int) -> Run | None:
        """Return a run that replays `calls` calls, a multiple of `sets`, at once; None where devices have no graphs."""

    def host_seconds(self, run: Run) -> float | None:
        """Return how long the host takes to launch a call; None where it computes the call itself."""

    def cache_bytes(self) -> int:
        """Return the size of the largest cache between the device and its memory."""

    def extra_bytes(self, run: Run) -> int:
        """Return the most memory that a call holds beyond its inputs."""


class CpuClock:
    """Wall clock around each call; what a call returns is freed outside of it, since that is not the op's work."""

    device = torch.device("cpu")
    sample_seconds = 2e-3
    warm_seconds = 0.0

    def sample(self, run: Run, first: int, calls: int, sets: int = 1) -> float:
        """Return the mean seconds of a call."""
        total = 0.0
        for turn in range(first, first + calls):
            begin = time.perf_counter()
            result = run(turn)
            total += time.perf_counter() - begin
            del result
        return total / calls

    def capture(self, run: Run, sets: int, calls: int) -> Run | None:
        """Return None: there are no graphs."""
        return None

    def host_seconds(self, run: Run) -> float | None:
        """Return None: a call is over when it returns."""
        return None

    def cache_bytes(self) -> int:
        """Return the size of the last-level cache; 32 MiB where the system does not say."""
        sizes = []
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
            match = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
            if match:
                sizes.append(int(match[1]) * (2**10 if match[2] == "K" else MEBIBYTE))
        return max(sizes, default=32 * MEBIBYTE)

    def extra_bytes(self, run: Run) -> int:
        """Return the peak of torch's allocations during a call; the result counts, what the C++ heap holds does not."""
        with (
            _without_messages(),
            # torch before 2.13 warns of a single cycle unless told to keep its events.
            torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
            ) as profile,
        ):
            result = run(0)
        held = peak = 0
        results: Any = profile.profiler
        for event in results.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        del result
        return peak


@contextmanager
def _without_messages() -> Generator[None, None, None]:
    """Keep to itself what the profiler writes to the error stream, past Python."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class CudaClock:
    """CUDA events around calls in a row: a kernel's own time, or the host's where launching takes longer."""

    sample_seconds = 3e-3
    warm_seconds = 0.2  # an idle GPU needs a while to raise its clocks

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._side: torch.cuda.Stream | None = None

    def sample(self, run: Run, first: int, calls: int, sets: int = 1) -> float:
        """Return the mean seconds of a call."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        # The allocator would hand out the output before again, and the L2 would take the writes.
        kept: deque[Sequence[Tensor]] = deque(maxlen=sets)
        # Not timed: while the GPU works on it, the host gets ahead, and no idle time enters the sample.
        kept.append(run(first))
        begin.record()
        for turn in range(first + 1, first + 1 + calls):
            kept.append(run(turn))
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / calls

    def capture(self, run: Run, sets: int, calls: int) -> Run | None:
        """Return the replay of one graph, whose outputs are those of its last call with input set 0."""
        side = self._side = self._side or torch.cuda.Stream(self.device)
        current = torch.cuda.current_stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):  # what a first call sets up must not be captured
            run(0)
        current.wait_stream(side)
        graph, kept = torch.cuda.CUDAGraph(), deque[Sequence[Tensor]](maxlen=sets)
        # A capture that fails leaves its stream the current one.
        with torch.cuda.stream(current), torch.cuda.graph(graph, stream=side):
            for turn in range(calls):
                kept.append(run(turn))

        def replay(turn: int) -> Sequence[Tensor]:
            graph.replay()
            return kept[0]

        return replay

    def host_seconds(self, run: Run) -> float | None:
        """Return the median over bursts that start on an idle GPU and are too short to fill its queue of launches."""
        bursts: list[float] = []
        start = time.perf_counter()
        while len(bursts) < 9 and (not bursts or time.perf_counter() - start < HOST_SECONDS):
            torch.cuda.synchronize(self.device)
            begin = time.perf_counter()
            for turn in range(5):
                run(turn)
            bursts.append((time.perf_counter() - begin) / 5)
        torch.cuda.synchronize(self.device)
        return statistics.median(bursts)

    def cache_bytes(self) -> int:
        """Return the size of the L2 cache."""
        return int(torch.cuda.get_device_properties(self.device).L2_cache_size)

    def extra_bytes(self, run: Run) -> int:
        """Return the peak of the allocator during a call, above what it held before; the result counts."""
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        result = run(0)
        peak = torch.cuda.max_memory_allocated(self.device)
        del result
        return peak - before


class OneSet(CpuClock):
    """For cases on any device that are made and run once but not timed: without a cache, one input set is enough."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def cache_bytes(self) -> int:
        """Return 0."""
        return 0


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device.

    Raises:
        ValueError: for a kind of device that has none.
    """
    if device.type == "cpu":
        return CpuClock()
    if device.type == "cuda":
        return CudaClock(device)
    raise ValueError(f"device must be of type cpu or cuda, got {device}")

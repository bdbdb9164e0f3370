"""`python -m benchmarks.triton_host`: what checks and launchers of Triton's kernels cost the host; needs no GPU.

Kernels are compiled for sm_90 in an empty cache. Times are of the process and its children, not of the clock: other
programs on the machine do not count.
"""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.backends.compiler import GPUTarget

from lesa_kernels.ops import OPS

COUNTS = (4, 8, 16, 32, 64)
CALLS = 15  # timed together: the clock of a process ticks in microseconds
SEGMENT = 6
N = 2048


class NoGpu:
    """Stands in for Triton's driver: kernels are compiled, and their launches do nothing."""

    def __init__(self) -> None:
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        """Return what is compiled for."""
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        """Return the first device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Return the default stream."""
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return those that compiling and launching ask for."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[str, str, int, int, int]:
        """Return a module, a function, its registers, its spills and the most threads of a block."""
        return name, name, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what launches one compiled kernel."""
        return lambda *arguments: None


def calls(ops: Any, count: int) -> dict[str, Callable[[], Any]]:
    """Return calls by name, of features of 16 bits."""

    def features(number: int) -> list[Tensor]:
        return [torch.randn(N).bfloat16() for _ in range(number)]

    history, target, ring = features(count), features(1)[0], torch.randn(count + SEGMENT, N).bfloat16()
    weight, bias, gain = torch.randn(count), torch.randn(1), torch.randn(1)
    segment, most = ((torch.randn(rows, count), torch.randn(rows)) for rows in (SEGMENT, 64))
    read, write = list(range(count)), list(range(SEGMENT))
    return {
        "push": lambda: ops.push(ring, target, 1),
        "predict": lambda: ops.predict(history, weight, bias, gain),
        f"forecast, M = {SEGMENT}": lambda: ops.forecast(history, *segment),
        "forecast, M = 64": lambda: ops.forecast(history, *most),
        f"forecast_into, M = {SEGMENT}": lambda: ops.forecast_into(ring, *segment, read, write),
        "predict_l1": lambda: ops.predict_l1(history, target, weight, bias, gain, None),
        "predict_backward": lambda: ops.predict_backward(target, history, weight, bias, gain, False),
        "gram": lambda: ops.gram(history),
        "identity": lambda: ops.identity(target),
    }


def seconds_of(call: Callable[[], Any]) -> float:
    """Return the seconds that processors work on a call, those of the assembler included."""
    before = os.times()
    call()
    return sum(after - start for after, start in zip(os.times()[:4], before[:4], strict=True))


def microseconds_of(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Return the least and the median time of a call that has been made before."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        times.append((time.process_time() - start) / CALLS * 1e6)
    return min(times), statistics.median(times)


def main(
    repeats: Annotated[int, typer.Option(help="How often calls are timed.", min=1)] = 300,
    count: Annotated[list[int], typer.Option(help="A K to compile for.", min=1, max=64)] = list(COUNTS),  # noqa: B006
) -> None:
    """Print the seconds to compile the kernels of K features, and the microseconds of a call of K = 8."""
    torch.set_num_threads(1)
    launchers = importlib.import_module("lesa_kernels.backends.triton")
    ops = SimpleNamespace(**{name: op.checked(getattr(launchers, name)) for name, op in OPS.items()})
    before, triton.runtime.driver._active = triton.runtime.driver._active, NoGpu()
    compiling = Table("op", *[f"K = {each}, s" for each in count])
    calling = Table("op, K = 8", "least, us", "median, us")
    console = Console()
    console.print(f"Triton {triton.__version__}, torch {torch.__version__}, {platform.machine()}, launches left out")
    try:
        with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
            triton.knobs.cache.dir = folder
            calls(ops, 3)["push"]()  # starts the compiler; one kernel for all K
            of_count = [calls(ops, each) for each in count]
            for name in list(of_count[0])[1:]:
                compiling.add_row(name, *[f"{seconds_of(each[name]):.1f}" for each in of_count])
            console.print(compiling)
            for name, call in calls(ops, 8).items():
                call()
                least, median = microseconds_of(call, repeats)
                calling.add_row(name, f"{least:.1f}", f"{median:.1f}")
            console.print(calling)
    finally:
        triton.runtime.driver._active = before


if __name__ == "__main__":
    typer.run(main)

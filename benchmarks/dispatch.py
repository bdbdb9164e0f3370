"""`python -m benchmarks.dispatch`: host time of a call by autograd mode, and what of it is autograd's Python."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import lesa_kernels  # noqa: F401 - importing declares the ops

INPUTS, ROWS, ELEMENTS = 8, 6, 64  # so small that the kernel's work does not count
CALLS = 200  # of one sample

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "gradients on": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    # What a call would cost if no Python stood at autograd's keys.
    "below autograd": torch._C._AutoDispatchBelowADInplaceOrView,
}


def calls() -> dict[str, Callable[[], object]]:
    """Make a call of each op that runs while a model samples, on tensors from outside of inference mode."""
    ops = torch.ops.lesa
    history = [torch.randn(ELEMENTS) for _ in range(INPUTS)]
    weight, bias, gain = torch.randn(INPUTS), torch.zeros(1), torch.ones(1)
    ring, coefficients, offsets = torch.randn(INPUTS + 2, ELEMENTS), torch.randn(ROWS, INPUTS), torch.zeros(ROWS)
    read, write = list(range(INPUTS)), list(range(ROWS))
    return {
        "predict": lambda: ops.predict(history, weight, bias, gain),
        "forecast": lambda: ops.forecast(history, coefficients, offsets),
        "forecast_into": lambda: ops.forecast_into(ring, coefficients, offsets, read, write),
        "push": lambda: ops.push(ring, history[0], 0),
    }


def sample(call: Callable[[], object], mode: str) -> float:
    """Return the microseconds of one call in a mode: processor time, since a busy machine takes the rest away."""
    with MODES[mode]():
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        return (time.thread_time() - begin) / CALLS * 1e6


def main(samples: Annotated[int, typer.Option(help="Samples of each op and mode, in turn.", min=3)] = 101) -> None:
    """Print the median microseconds of a call of each op in each mode."""
    torch.set_num_threads(1)
    table = Table("op", *MODES)
    for op, call in calls().items():
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(samples):
            for mode, taken in times.items():
                taken.append(sample(call, mode))
        table.add_row(op, *(f"{statistics.median(taken):.1f}" for taken in times.values()))
    console = Console()
    console.print(f"torch {torch.__version__}, {platform.machine()}, one thread, microseconds a call, medians")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)

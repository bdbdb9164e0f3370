"""Launches the main kernels at FLUX's size, each behind a mark, for a profiler of hardware counters."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from tools.gpu_check.calls import CALLS, Size, namespaces

FLUX = Size("FLUX 1024x1024", (1, 4096, 3072), (64, 51, 256))
SMALL = Size("small", (3, 1031), (5, 7, 6))
PROFILED = ("predict", "forecast", "predict_l1", "gram", "predict_backward", "push")
MARK = "spin_kernel"  # the kernel of torch.cuda._sleep


def titles() -> list[str]:
    """Return what is launched, in this order."""
    return [f"{op}, {engine}" for engine in ("lesa", "triton") for op in PROFILED]


def main(device: str, seconds: float = float("inf")) -> None:
    """Launch everything once to warm up, then once more behind its mark, with the profiler on.

    Args:
        device: "cuda" or "cpu".
        seconds: after which nothing more is launched.
    """
    begin = time.monotonic()
    engines = namespaces()
    on_gpu = device == "cuda"
    with torch.device(device), torch.inference_mode():
        for title in titles():
            if time.monotonic() - begin > seconds:
                break
            op, engine = title.split(", ")
            if engine == "triton" and not on_gpu:
                continue
            call = CALLS[op](torch.bfloat16, FLUX if on_gpu else SMALL)
            call.run(engines[engine])
            _profiled(lambda call=call, engine=engine: call.run(engines[engine]), on_gpu)  # type: ignore[misc]
            print(title, flush=True)


def _profiled(run: Callable[[], Any], on_gpu: bool) -> None:
    if not on_gpu:
        run()
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    torch.cuda._sleep(1)
    run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(sys.argv[1], *map(float, sys.argv[2:]))

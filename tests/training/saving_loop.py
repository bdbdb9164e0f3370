"""A process that saves small predictors into one folder: `saving_loop.py FOLDER KIND [N]` says how often it did.

KIND is "one" for a predictor or "two" for those of two branches; seeds 0 and 1 take turns until its input ends. With N
it sends itself SIGSTOP before the N-th rename of its first save.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from small_training import SIGMAS, small_predictor

from lesa_kernels import LesaPredictor
from lesa_kernels.training.reports import save_predictors


def of_seed(seed: int) -> LesaPredictor:
    """Make one of two predictors that differ in their weights and in their configs."""
    predictor = small_predictor(seed)
    predictor.trained_sigmas = SIGMAS if seed else [sigma**2 for sigma in SIGMAS]
    return predictor


def stop_before(rename: int) -> None:
    replace, left = os.replace, itertools.count(1)

    def counted(*paths: Any) -> None:
        if next(left) == rename:
            os.kill(os.getpid(), signal.SIGSTOP)
        replace(*paths)

    os.replace = counted


def main(folder: Path, kind: str, rename: int | None) -> None:
    torch.set_num_threads(1)
    predictors = [of_seed(seed) for seed in (0, 1)]
    if rename is not None:
        stop_before(rename)
    print("begins", flush=True)
    ended = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
    saves = 0
    while not ended.is_set():
        predictor = predictors[(saves + 1) % 2]
        save_predictors({"cond": predictor} | ({"uncond": predictor} if kind == "two" else {}), folder)
        saves += 1
    print(saves)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)

"""Processes that save for ever, for `test_killed_saves.py` to kill."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from saving_loop import of_seed
from small_training import runs

from lesa_kernels.training import FeatureStore
from lesa_kernels.training.reports import save_predictors


def save(folder: str, kind: str) -> None:
    """Save predictors of the seeds 0 and 1 in turn: one, or those of two branches."""
    torch.set_num_threads(1)
    for seed in itertools.cycle((0, 1)):
        predictor = of_seed(seed)
        save_predictors({"cond": predictor} | ({"uncond": predictor} if kind == "two" else {}), Path(folder))


def record(folder: str, kind: str) -> None:
    """Record all runs; goes on where the folder's recording was stopped."""
    torch.set_num_threads(1)
    FeatureStore.record(Path(folder), runs(40), model=kind, progress=False)

"""What a training writes for its user: losses, a plot, the predictors, TensorBoard's scalars."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lesa_kernels.files import replacing
from lesa_kernels.predictors import LesaPredictor, LinearPredictor
from lesa_kernels.training.config import Batch, TrainingResult, losses_by_phase
from lesa_kernels.training.plots import plot_losses


def save_predictors(predictors: Mapping[str, LesaPredictor | LinearPredictor], folder: Path) -> None:
    """Write predictors with `save_pretrained`: one into the folder itself, several into folders of their branches.

    Each file appears whole or not at all, so that a predictor can be loaded at any time.
    """
    for branch, predictor in predictors.items():
        predictor.save_pretrained(folder if len(predictors) == 1 else folder / branch)


def write_losses(folder: Path, batches: Sequence[Batch], losses: Sequence[float], description: str) -> None:
    """Write `losses.csv` (phase, epoch, run, loss: one line a batch of runs) and the plot `loss.png`."""
    with replacing(folder / "losses.csv") as file, file.open("w", newline="", encoding="utf-8") as text:
        rows = csv.writer(text)
        rows.writerow(("phase", "epoch", "run", "loss"))
        for batch, loss in zip(batches, losses, strict=False):
            rows.writerow((batch.phase, batch.epoch, " ".join(map(str, batch.runs)), loss))
    plot_losses({description: TrainingResult(losses_by_phase(batches, losses))}, folder / "loss.png")


class Scalars:
    """TensorBoard's view of a training, in the folder `tensorboard`; does nothing where it was not asked for.

    Args:
        folder: where the training writes; None: nothing is written.
        done: batches that are done; what a killed process wrote of later ones is dropped.
    """

    def __init__(self, folder: Path | None, done: int) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done)

    def add(self, index: int, batch: Batch, loss: float, rate: float) -> None:
        """Note the loss and the learning rate at the end of a batch."""
        if self._writer is not None:
            self._writer.add_scalar(f"loss/{batch.phase}", loss, index)
            self._writer.add_scalar("learning rate", rate, index)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


def check_reports(folder: Path | None, tensorboard: bool, branches: Sequence[str]) -> None:
    """Check, before anything is trained, that all that was asked for can be written.

    Raises:
        ValueError: when there is no folder to write to, or a branch's name is none of a folder in it.
        ModuleNotFoundError: when a package is missing.
    """
    if folder is None and tensorboard:
        raise ValueError("tensorboard=True needs a folder to write to, got out=None")
    for branch in branches:
        if folder is not None and (branch in ("", "..") or Path(branch).name != branch):
            raise ValueError(f"predictor: each branch gets a folder of its name in out, which {branch!r} cannot be")
    for module, reason in [("matplotlib", "out")] * (folder is not None) + [
        ("tensorboard", "tensorboard=True")
    ] * tensorboard:
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"{reason} needs the package {module}: pip install {module}")

"""Writes the results of a training: losses, a plot, the predictors, scalars for TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE

from lesa_kernels.files import only_writer, replacing
from lesa_kernels.predictors.saved import Saved
from lesa_kernels.training.config import Batch, TrainingResult, losses_by_phase


def save_predictors(predictors: Mapping[str, Saved], folder: Path) -> None:
    """Write predictors with `save_pretrained`: one into the folder itself, several into folders of their branches.

    Each file appears whole or not at all, so that a predictor can be loaded at any time. Several take the place of one
    that lies in the folder; of several that are saved there at once, the last take their places together.
    """
    if len(predictors) == 1:
        (predictor,) = predictors.values()
        predictor.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder, SAFETENSORS_SINGLE_FILE):
        for name in (CONFIG_NAME, SAFETENSORS_SINGLE_FILE):
            (folder / name).unlink(missing_ok=True)
        for branch, predictor in predictors.items():
            predictor.save_pretrained(folder / branch)


def write_losses(folder: Path, batches: Sequence[Batch], losses: Sequence[float], description: str) -> None:
    """Write `losses.csv` (phase, epoch, run, loss: one line a batch of runs) and the plot `loss.png`."""
    with replacing(folder / "losses.csv") as file, file.open("w", newline="", encoding="utf-8") as text:
        rows = csv.writer(text)
        rows.writerow(("phase", "epoch", "run", "loss"))
        for batch, loss in zip(batches, losses, strict=False):
            rows.writerow((batch.phase, batch.epoch, " ".join(map(str, batch.runs)), loss))
    plot_losses({description: TrainingResult(losses_by_phase(batches, losses))}, folder / "loss.png")


def plot_losses(results: Mapping[str, TrainingResult], path: str | Path) -> Path:
    """Draw the loss of each batch of runs over the course of training, one line a training.

    Args:
        results: name of a training -> what `train` returned.
        path: the PNG to write.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, result in results.items():
        values = [value for phase in result.losses.values() for value in phase]
        marker = "." if len(values) == 1 else None
        (line,) = axes.plot(range(1, len(values) + 1), values, label=name, linewidth=1.2, marker=marker)
        first_phase = len(next(iter(result.losses.values()), []))
        if 0 < first_phase < len(values):
            axes.axvline(first_phase + 0.5, color=line.get_color(), linestyle=":", linewidth=0.8)
    axes.set(xlabel="batch of runs (dotted: begin of the closed loop)", ylabel="mean L1 loss", yscale="log")
    axes.set_title("Training the LESA predictor")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replacing(Path(path)) as file:
        figure.savefig(file, dpi=130, format="png")
    return Path(path)


def plot_curve(curves: Mapping[str, Mapping[int, float]], path: str | Path, chosen: int | None = None) -> Path:
    """Draw dB over calls, so that a budget can be picked by eye.

    Args:
        curves: name of a method -> number of calls -> dB.
        path: the PNG to write.
        chosen: number of calls to mark.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        calls = sorted(points)
        axes.plot(calls, [points[count] for count in calls], label=name, linewidth=1.2, marker=".")
    if chosen is not None:
        axes.axvline(chosen, color="gray", linestyle=":", linewidth=1, label=f"chosen: {chosen} calls")
    axes.set(xlabel="calls of the model a run", ylabel="dB against the unaccelerated runs")
    axes.set_title("Quality by budget")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replacing(Path(path)) as file:
        figure.savefig(file, dpi=130, format="png")
    return Path(path)


class Scalars:
    """Writes losses and rates for TensorBoard into the folder `tensorboard`. A context manager.

    Args:
        folder: of the training; None writes nothing.
        done: batches that are done; what a killed process wrote of later ones is dropped.
    """

    def __init__(self, folder: Path | None, done: int) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done)

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, index: int, batch: Batch, loss: float, rate: float) -> None:
        """Write the loss and the learning rate at the end of a batch."""
        if self._writer is not None:
            self._writer.add_scalar(f"loss/{batch.phase}", loss, index)
            self._writer.add_scalar("learning rate", rate, index)


def check_reports(folder: Path | None, tensorboard: bool, branches: Sequence[str]) -> None:
    """Check, before anything is trained, that all results can be written.

    Raises:
        ValueError: when there is no folder to write to, or a branch's name would lead out of it.
        ModuleNotFoundError: when a package is missing.
    """
    if folder is None and tensorboard:
        raise ValueError("tensorboard=True needs a folder to write to, got out=None")
    for branch in branches:
        if folder is not None and (branch in ("", "..") or Path(branch).name != branch):
            raise ValueError(f"predictor: each branch gets a folder of its name in out, which {branch!r} cannot be")
    needed = {"matplotlib": "out"} if folder is not None else {}
    if tensorboard:
        needed["tensorboard"] = "tensorboard=True"
    for module, argument in needed.items():
        if importlib.util.find_spec(module) is None:
            raise ModuleNotFoundError(f"{argument} needs the package {module}: pip install {module}")

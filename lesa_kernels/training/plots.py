"""Pictures of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lesa_kernels.files import replacing
from lesa_kernels.training.config import TrainingResult


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
        guided = len(next(iter(result.losses.values()), []))
        if 0 < guided < len(values):
            axes.axvline(guided + 0.5, color=line.get_color(), linestyle=":", linewidth=0.8)
    axes.set(xlabel="batch of runs (dotted: from true history to closed loop)", ylabel="mean L1 loss", yscale="log")
    axes.set_title("Training the LESA predictor")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    with replacing(Path(path)) as file:
        figure.savefig(file, dpi=130, format="png")
    return Path(path)

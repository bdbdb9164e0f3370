"""A training that says what it is doing: `told_training.py FOLDER` prints each phase as it begins."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import torch
from small_training import QUICK, SCHEDULE, runs, small_predictor

from lesa_kernels.sources import Player
from lesa_kernels.training import Recorded, checkpoint, reports, train, trainer


def tell(phase: str) -> None:
    """Print a phase; whoever reads knows of it before the next instruction."""
    os.write(1, f"{phase}\n".encode())


def telling(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def told(*arguments: Any, **options: Any) -> Any:
        tell(phase)
        return function(*arguments, **options)

    return told


class Told(Recorded):
    """Runs that say that they are played."""

    def play(self, runs: Sequence[int], player: Player) -> None:
        """See `Source.play`."""
        tell("playing")
        super().play(runs, player)


def main(folder: str) -> None:
    """Save after every batch."""
    torch.set_num_threads(1)
    os.replace = telling("renaming", os.replace)  # type: ignore[assignment]
    os.fsync = telling("bringing to the disk", os.fsync)  # type: ignore[assignment]
    reports.plot_losses = telling("drawing", reports.plot_losses)
    trainer.save_predictors = telling("writing the predictor", trainer.save_predictors)
    trainer.write_losses = telling("writing the losses", trainer.write_losses)
    checkpoint.save_file = telling("writing the checkpoint", checkpoint.save_file)
    tell("opening")
    source = runs()
    told = Told(source._trajectories, source.sigmas)
    train(small_predictor(), told, SCHEDULE, QUICK, out=folder, progress=False, save_seconds=0)


if __name__ == "__main__":
    main(sys.argv[1])

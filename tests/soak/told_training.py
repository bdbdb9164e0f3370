"""A training that says what it is doing, for `test_kills.py`, which starts it in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import matplotlib.figure  # noqa: F401 - imported before the processes part, as it takes long
import torch
from small_training import QUICK, SCHEDULE, runs, small_predictor

from lesa_kernels.training import RecordedSource, checkpoint, reports, train, trainer
from lesa_kernels.trajectories import StepPolicy

Tell = Callable[[str], None]


def telling(tell: Tell, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def told(*arguments: Any, **options: Any) -> Any:
        tell(phase)
        return function(*arguments, **options)

    return told


class Told(RecordedSource):
    """Runs that say that they are run."""

    def __init__(self, tell: Tell) -> None:
        source = runs()
        super().__init__(source._trajectories, source.sigmas)
        self._tell = tell

    def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
        """See `TrajectorySource.run`."""
        self._tell("sampling")
        super().run(runs, policy)


def main(folder: str, ear: Connection) -> None:
    """Save after every batch, and send each phase before it begins."""

    def tell(phase: str) -> None:
        ear.send_bytes(phase.encode())

    torch.set_num_threads(1)
    os.replace = telling(tell, "renaming", os.replace)  # type: ignore[assignment]
    os.fsync = telling(tell, "bringing to the disk", os.fsync)  # type: ignore[assignment]
    reports.plot_losses = telling(tell, "drawing", reports.plot_losses)
    trainer.save_predictors = telling(tell, "writing the predictor", trainer.save_predictors)
    trainer.write_losses = telling(tell, "writing the losses", trainer.write_losses)
    checkpoint.save_file = telling(tell, "writing the checkpoint", checkpoint.save_file)
    tell("opening")
    train(small_predictor(), Told(tell), SCHEDULE, QUICK, out=folder, progress=False, save_seconds=0)

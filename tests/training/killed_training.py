"""A training for `test_resuming.py` to kill: `killed_training.py FOLDER [N]` kills itself before the Nth rename."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from small_training import SCHEDULE, SHORT, runs, small_predictor

from lesa_kernels.training import RecordedSource, train
from lesa_kernels.trajectories import StepPolicy


class Slow(RecordedSource):
    """Gives whoever wants to kill the training time to do so."""

    def __init__(self) -> None:
        source = runs()
        super().__init__(source._trajectories, source.sigmas)

    def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
        """See `TrajectorySource.run`."""
        time.sleep(0.1)
        super().run(runs, policy)


def kill_before(renames: int) -> None:
    replace, count = os.replace, 0

    def counted(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == renames:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*arguments)

    os.replace = counted  # type: ignore[assignment]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if len(sys.argv) > 2:
        kill_before(int(sys.argv[2]))
    train(small_predictor(), Slow(), SCHEDULE, SHORT, out=sys.argv[1], progress=False, save_seconds=0)

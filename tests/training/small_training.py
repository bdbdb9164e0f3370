"""A small predictor and smooth runs to train it on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lesa_kernels import LesaPredictor, Schedule
from lesa_kernels.training import RecordedSource, TrainingConfig
from lesa_kernels.trajectories import ModelCall, StepPolicy

STEPS = 20
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
SCHEDULE = Schedule.interval(STEPS, 4)
QUICK = TrainingConfig(10, 10, learning_rate=1e-2, decay="cosine", restart_each_phase=True)
SHORT = replace(QUICK, teacher_forcing_epochs=2, closed_loop_epochs=1)


def trajectories(count: int = 4, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """Paths between two random features, as a sampling run's are."""
    generator = torch.Generator().manual_seed(3)
    paths = []
    for _ in range(count):
        start, end = torch.randn(2, 1, 8, 16, generator=generator)
        paths.append([(t * start + (1 - t) * end + 0.3 * t * (1 - t) * start).to(dtype) for t in SIGMAS[:-1]])
    return paths


def runs(count: int = 4, dtype: torch.dtype = torch.float32) -> RecordedSource:
    return RecordedSource(trajectories(count, dtype), SIGMAS)


def small_predictor(seed: int = 0) -> LesaPredictor:
    torch.manual_seed(seed)
    return LesaPredictor(num_steps=STEPS, stages=((0.7, 2), (0.4, 3), (0.0, 3)), hidden_dim=16)


def equal(a: LesaPredictor, b: LesaPredictor) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def files_in(folder: Path) -> set[str]:
    """Name all files but the lock, which stays."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".lock"}


class Guided:
    """A source of two branches, with a tail: what a pipeline with guidance is."""

    def __init__(self, own: Sequence[Sequence[Tensor]], other: Sequence[Sequence[Tensor]]) -> None:
        self.sigmas = tuple(SIGMAS)
        self._features = {"cond": own, "uncond": other}
        self.outputs: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._features["cond"])

    def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
        for step in range(STEPS):
            for branch, features in self._features.items():
                feature = torch.cat([features[run][step] for run in runs])
                answer = policy(ModelCall(step, lambda feature=feature: feature, torch.tanh, branch=branch))
                assert answer is not None
                self.outputs.append(answer)


class Meddling:
    """A source that does something at one call of the model, counted over the whole training."""

    def __init__(self, source: RecordedSource, at: int, action: Callable[[Tensor], Tensor]) -> None:
        self.sigmas = source.sigmas
        self._source, self._at, self._action = source, at, action
        self.calls = 0

    def __len__(self) -> int:
        return len(self._source)

    def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
        def meddled(call: ModelCall) -> Tensor | None:
            number, self.calls = self.calls, self.calls + 1
            if number != self._at:
                return policy(call)
            feature = self._action(call.blocks())
            return policy(ModelCall(call.step, lambda: feature, branch=call.branch))

        self._source.run(runs, meddled)

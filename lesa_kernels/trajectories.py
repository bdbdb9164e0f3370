"""Defines runs of a model, call by call, which trainings and fits learn from.

A *source* samples. It hands each call of the model to a *policy*, which runs the blocks or puts a forecast in their
place, and returns the model's output. The published training, the feature store and the fits are policies; memory, a
store on disk, a diffusers pipeline and a loop of one's own are sources.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from lesa_kernels.checks import check_decreasing, check_int, check_list, check_type

ONLY_BRANCH = "cond"
"""The branch of models that are called once a step; guidance adds others ("uncond"), each with a history of its own."""

HALVES = ("uncond", "cond")
"""The branches of guidance in one call of the model: the halves of its batch, in this order in most pipelines (SD3)."""


@dataclass(frozen=True)
class ModelCall:
    """One call of the model, handed to a policy.

    Args:
        step: which step of the run.
        blocks: runs the model's blocks and returns the feature [*feature], detached; to be called at most once.
        tail: feature -> the model's output, differentiable in the feature; None where a source holds features only.
        latents: the input of the model, None where a source holds features only.
        branch: of the guidance.
        model: which one it is of, where several take turns (Wan 2.2); no history of features reaches across them.
        timestep: what the model is told of the noise level, in the model's own units; None where it is not one number.
        tell: takes what the model is to be told instead, before `blocks`; None where the source cannot do that.
    """

    step: int
    blocks: Callable[[], Tensor]
    tail: Callable[[Tensor], Tensor] | None = None
    latents: Tensor | None = None
    branch: str = ONLY_BRANCH
    model: int = 0
    timestep: float | None = None
    tell: Callable[[float], None] | None = None


StepPolicy: TypeAlias = Callable[[ModelCall], "Tensor | None"]
"""Takes a call and returns the model's output, or None where there is no tail.

The output is `call.tail` of a feature, or a tensor of its own in that shape and dtype: then the model need not run.
"""


class StopRun(Exception):
    """Raised by a policy to end a run early; the caller of `run` catches it."""


class TrajectorySource(Protocol):
    """Runs to learn from. The same runs give the same calls whenever they are sampled."""

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The S+1 falling noise levels of every run."""

    def __len__(self) -> int:
        """How many runs there are."""

    def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
        """Sample some runs as one batch: features and latents of all of them lie along the first dimension.

        Args:
            runs: numbers below `len(self)`.
            policy: called once for each step and branch, steps in order.
        """


def check_source(source: object, *, may_start_late: bool = False) -> None:
    """Check that an argument is a source with at least one run.

    Raises:
        TypeError: when it is something else.
        ValueError: when it has no runs, or they start late where they may not.
    """
    if not all(hasattr(source, name) for name in ("sigmas", "run", "__len__")):
        raise TypeError(f"source must have sigmas, a length and run(), got {type(source).__name__}")
    if len(source) < 1:  # type: ignore[arg-type]
        raise ValueError("source must hold at least one run, got none")
    if not may_start_late and (first := getattr(source, "first_step", 0)):
        raise ValueError(f"source must start its runs at step 0, they start at step {first}: fit_solver takes such")


class RecordedSource:
    """Features of unaccelerated runs, in memory.

    Args:
        trajectories: for each run its S features [B, *feature], in the order of the steps.
        sigmas: S+1 noise levels of those runs.

    Raises:
        ValueError: when there is no run, or one does not hold S features.
    """

    def __init__(self, trajectories: Sequence[Sequence[Tensor]], sigmas: Sequence[float]) -> None:
        self.sigmas = check_decreasing(sigmas)
        check_type("trajectories", trajectories, Sequence, "a sequence of runs")
        if not trajectories:
            raise ValueError("trajectories must hold at least one run, got none")
        for index, trajectory in enumerate(trajectories):
            check_type(f"trajectories[{index}]", trajectory, (Sequence, Tensor), "a sequence of features")
            if len(trajectory) != len(self.sigmas) - 1:
                raise ValueError(
                    f"trajectories[{index}] must hold {len(self.sigmas) - 1} features (the steps of the sigmas), "
                    f"got {len(trajectory)}"
                )
        self._trajectories = trajectories

    def __len__(self) -> int:
        return len(self._trajectories)

    def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
        """See `TrajectorySource.run`."""
        chosen = [self._trajectories[run] for run in runs]
        for step in range(len(self.sigmas) - 1):
            features = [trajectory[step] for trajectory in chosen]
            feature = features[0] if len(features) == 1 else torch.cat(features)
            policy(ModelCall(step, lambda feature=feature: feature))  # type: ignore[misc]


class LoopSource:
    """Runs of a loop of one's own.

    Args:
        loop: `loop(runs, policy)` samples those runs as one batch; at each step it makes a `ModelCall`, hands it to the
            policy and goes on with the output that it gets. It must do the same for the same runs.
        count: how many runs there are.
        sigmas: S+1 noise levels.
    """

    def __init__(self, loop: Callable[[Sequence[int], StepPolicy], None], count: int, sigmas: Sequence[float]) -> None:
        check_type("loop", loop, Callable, "a function")  # type: ignore[arg-type]
        self.sigmas = check_decreasing(sigmas)
        self._loop = loop
        self._count = check_int("count", count, 0)

    def __len__(self) -> int:
        return self._count

    def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
        """See `TrajectorySource.run`."""
        self._loop(runs, policy)


class SelectedRuns:
    """Some of the runs of a source: those to fit to, or those to judge on.

    Args:
        source: which has them.
        runs: their numbers in it.

    Raises:
        TypeError, ValueError: when source is none, or has no such runs.
    """

    def __init__(self, source: TrajectorySource, runs: Sequence[int]) -> None:
        check_source(source, may_start_late=True)
        self.sigmas = source.sigmas
        self.first_step: int = getattr(source, "first_step", 0)
        self._source = source
        self._runs = [
            check_int(f"runs[{index}]", run, 0, len(source) - 1)
            for index, run in enumerate(check_list("runs", runs, "numbers of runs"))
        ]

    def __len__(self) -> int:
        return len(self._runs)

    def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
        """See `TrajectorySource.run`."""
        self._source.run([self._runs[run] for run in runs], policy)


def watch(call: ModelCall) -> tuple[Tensor, Tensor | None]:
    """Run the blocks and the tail of a call; return the feature and the output."""
    feature = call.blocks()
    return feature, None if call.tail is None else call.tail(feature)


def check_single_model(call: ModelCall) -> None:
    """Check that a call is of the only model, for those who learn from a history of features.

    Raises:
        ValueError: when it is of a model that takes turns with another.
    """
    if call.model:
        raise ValueError(
            "source must run one model, as no history of features reaches from one to another, "
            f"got a call of a second one at step {call.step}"
        )

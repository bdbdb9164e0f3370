"""Samples runs of a source in batches, and watches their steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from torch import Tensor

from lesa_kernels.checks import check_int
from lesa_kernels.machine import MANY_ELEMENTS, one_thread
from lesa_kernels.trajectories import ModelCall, StepPolicy, StopRun, TrajectorySource


def run_until_stopped(source: TrajectorySource, runs: Sequence[int], policy: StepPolicy) -> None:
    """Sample runs until their end, or until the policy stops them."""
    try:
        source.run(runs, policy)
    except StopRun:
        return


def batches(source: TrajectorySource, batch: int) -> list[range]:
    """Split all runs of a source into batches.

    Raises:
        ValueError: when the batch is not positive.
    """
    batch = check_int("batch", batch, 1)
    return [range(start, min(start + batch, len(source))) for start in range(0, len(source), batch)]


class SmallModels:
    """Lets small models compute with one thread, as `train` does, once a call has shown how large their features are.

    See `lesa_kernels.machine.one_thread`.
    """

    def __init__(self) -> None:
        self._is_small = False

    def threads(self) -> AbstractContextManager[None]:
        """Return the with statement to compute in."""
        return one_thread() if self._is_small else nullcontext()

    def limit(self, policy: StepPolicy) -> StepPolicy:
        """Return a policy that answers as another does, in so many threads as the model's features need."""

        def answer(call: ModelCall) -> Tensor | None:
            def blocks() -> Tensor:
                feature = call.blocks()
                self._is_small = feature.numel() < MANY_ELEMENTS
                return feature

            with self.threads():
                return policy(replace(call, blocks=blocks))

        return answer


@dataclass
class SeenStep:
    """What a run shows at one step: its latents before the step, and the output of each call of the model, copied."""

    step: int
    latents: Tensor
    outputs: dict[str, Tensor] = field(default_factory=dict)


class StepWatcher:
    """A policy that answers calls by a function, and hands each step to another once the next step begins.

    Args:
        answer: call -> the model's output.
        close: takes a step and the latents after it.

    Attributes:
        last: the latest step.
    """

    def __init__(self, answer: StepPolicy, close: Callable[[SeenStep, Tensor], None]) -> None:
        self.last: SeenStep | None = None
        self._answer = answer
        self._close = close

    def __call__(self, call: ModelCall) -> Tensor:
        """Answer a call."""
        if call.latents is None or call.tail is None:
            raise ValueError("source must run a model with its tail and latents; this one holds features only")
        if self.last is None or call.step != self.last.step:
            done, self.last = self.last, SeenStep(call.step, call.latents.detach().clone())
            if done is not None:
                self._close(done, self.last.latents)
        if call.branch in self.last.outputs:
            raise ValueError(
                f"source must call its model once a step, or once for each branch, got {call.branch!r} twice in step "
                f"{call.step}"
            )
        output = self._answer(call)
        if output is None:
            raise ValueError("source must run a model with its tail; this one holds features only")
        # A loop may write to what it gets.
        self.last.outputs[call.branch] = output.detach().clone()
        return output

"""Reads the current step from a scheduler, and follows a model's calls through a run.

No tensor value is read but what `levels` reads, once a run.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lesa_kernels.checks import check_decreasing
from lesa_kernels.integrations.levels import Levels, has_index, read_levels
from lesa_kernels.integrations.levels import scheduler_incompatibility as scheduler_incompatibility
from lesa_kernels.trajectories import ONLY_BRANCH

# Sigmas pass through float32 on their way into a cache context.
_SIGMA_TOLERANCE = 1e-5
# Guidance makes two to four calls a step; more mean that the scheduler's step index stands still.
_MAX_CALLS = 4


@dataclass
class StepPosition:
    """How far one run through a schedule is."""

    source: Any  # the object that held the sigmas; another object means another run
    sigmas: tuple[float, ...]  # S+1 noise levels, none where they could not be read
    incompatibility: str | None = None  # why no step of this run can be forecast
    step: int = 0  # the latest; before the first call the step that the run begins at
    # Calls of the latest step and of the run, by cache context.
    seen: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    num_steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_steps = len(self.sigmas) - 1


def call_name(context: str, number: int) -> str:
    """Return the name of a call of the model: its cache context, and a number after the first of a step."""
    name = context or ONLY_BRANCH
    return f"{name} {number + 1}" if number else name


class StepTracker:
    """Follows a model from call to call; a new run begins where there are new sigmas or the step goes back.

    Steps and levels come from one of three: a pipeline's scheduler (looked up at every call, as users replace it), a
    scheduler, or S+1 sigmas, where calls are counted.
    """

    def __init__(self, pipeline: Any = None, scheduler: Any = None, sigmas: Sequence[float] | None = None) -> None:
        options = {"pipeline": pipeline, "scheduler": scheduler, "sigmas": sigmas}
        given = [name for name, value in options.items() if value is not None]
        if len(given) != 1:
            raise ValueError(
                "lesa: exactly one of a pipeline, scheduler= and sigmas= must give the steps of the run, "
                f"got {' and '.join(given) or 'none'}"
            )
        # A strong reference would keep the pipeline's text encoders alive as long as its transformer.
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._scheduler = scheduler if pipeline is None else pipeline.scheduler
        self._sigmas = None if sigmas is None else check_decreasing(sigmas)
        self.position: StepPosition | None = None
        if self._sigmas is None and not has_index(self._scheduler) and not hasattr(self._scheduler, "timesteps"):
            raise ValueError(
                "lesa: the scheduler must have sigmas and a step_index, or timesteps, "
                f"got {type(self._scheduler).__name__}; pass a bare transformer and sigmas= instead"
            )

    def place(self, context: Any) -> tuple[StepPosition, int, int]:
        """Return the run that a call belongs to, its step, and its number within the step and context.

        The step is that of diffusers' `CacheContext` where it has one, else the scheduler's, else the context's calls
        are counted. It is not below S where there were too many calls.
        """
        source, index = self._read()
        position, name, step = self.position, context.name, context.step_index
        if position is None or position.source is not source:
            position = self._begin(source)
        # A context that joins late joins at the step of the others.
        calls = position.calls.setdefault(name, position.step)
        if step is None:
            step = calls if index is None else index
        if self._sigmas is None:
            # A new run brings new sigmas, and a step may hold several calls.
            restarts = index is not None and step < position.step
        elif context.step_index is None:
            restarts = step >= position.num_steps
        else:
            restarts = step < position.step or (step == position.step and position.seen.get(name, 0) > 0)
        if restarts:
            position = self._begin(source)
            step = 0 if index is None and context.step_index is None else step
        if step != position.step:
            position.step = step
            position.seen.clear()
        number = position.seen.get(name, 0)
        position.seen[name] = number + 1
        position.calls[name] = position.calls.get(name, 0) + 1
        self.position = position
        return position, step, number

    @property
    def scheduler(self) -> Any:
        """The scheduler, None where sigmas were given."""
        return self._scheduler

    def read_levels(self) -> Levels:
        """Return what the run that begins is made of; on a GPU this is the one wait of a run."""
        return read_levels(self._scheduler) if self._sigmas is None else Levels(self._sigmas)

    def _read(self) -> tuple[Any, int | None]:
        """Return the object that holds the levels, and the scheduler's step, None where calls are counted."""
        if self._sigmas is not None:
            return self._sigmas, None
        if self._pipeline is not None and (pipeline := self._pipeline()) is not None:
            self._scheduler = pipeline.scheduler
        scheduler = self._scheduler
        if not has_index(scheduler):
            return scheduler.timesteps, None
        index = scheduler.step_index
        if index is None:
            # Schedulers set their index in step(), after the first call of the model; image-to-image begins late.
            index = getattr(scheduler, "begin_index", None) or 0
        return scheduler.sigmas, int(index)

    def _begin(self, source: Any) -> StepPosition:
        """Return the position of a run that begins."""
        levels = self.read_levels()
        position = StepPosition(source, levels.sigmas, levels.incompatibility)
        if self._pipeline is not None and not has_index(self._scheduler):
            # A pipeline that starts late says how many steps are left.
            left = getattr(self._pipeline(), "_num_timesteps", None) or position.num_steps
            position.step = max(position.num_steps - left, 0)
        return position


def find_incompatibility(
    position: StepPosition, context: Any, step: int, number: int, foreign_cache: bool
) -> str | None:
    """Say why a call that `StepTracker.place` placed cannot be forecast, None if it can."""
    if torch.is_grad_enabled():
        return "gradients are enabled; sample under torch.no_grad()"
    if foreign_cache:
        return "a cache of diffusers is enabled on the model as well"
    if position.incompatibility is not None:
        return position.incompatibility
    if not 0 <= step < position.num_steps:
        return f"step {step} came in a schedule of {position.num_steps} steps"
    if number >= _MAX_CALLS:
        return f"call {number + 1} of step {step} came; does the loop call scheduler.step?"
    sigma, total = context.sigma, context.num_inference_steps
    if total is not None and total != position.num_steps:
        return f"the cache context counts {total} steps, the sigmas {position.num_steps}"
    if isinstance(sigma, float) and not math.isclose(sigma, position.sigmas[step], abs_tol=_SIGMA_TOLERANCE):
        return f"the cache context says sigma {sigma} at step {step}, the sigmas say {position.sigmas[step]}"
    return None

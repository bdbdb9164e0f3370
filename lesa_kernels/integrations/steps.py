"""Follows a model's calls through a run: which step each is at, and whether it is of this run at all.

A scheduler, a cache context or the number of calls says the step; what the model is told of the noise level must agree.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from lesa_kernels.checks import check_decreasing
from lesa_kernels.integrations.levels import Levels, has_index, read_levels, scheduler_incompatibility
from lesa_kernels.integrations.models import TRANSFORMERS
from lesa_kernels.integrations.outputs import version_of
from lesa_kernels.trajectories import ONLY_BRANCH

# Sigmas pass through float32 on their way into a cache context.
_SIGMA_TOLERANCE = 1e-5
# Guidance makes two to four calls a step; more mean that the scheduler's step index stands still.
_MAX_CALLS = 4
# Two roundings to bfloat16, each by at most 2^-8, and what float32 makes of a zero.
_ROUNDING = 2.0**-7
_TINY = 1e-6
# T where nothing says it.
_TIMESTEPS = 1000
# The index of a scheduler before its first step.
_NOT_YET = -1


class Way(NamedTuple):
    """What a model is told at the S steps in one of the ways that pipelines have, but for rounding to bfloat16."""

    told: tuple[float, ...]
    tolerances: tuple[float, ...]

    def is_near(self, timestep: float, step: int) -> bool:
        """Whether a model may be told this at a step."""
        return 0 <= step < len(self.told) and abs(timestep - self.told[step]) <= self.tolerances[step] + _TINY


@dataclass
class StepPosition:
    """How far one run through a schedule is."""

    source: Any  # the object that held the sigmas; another object means another run
    sigmas: tuple[float, ...]  # S+1 noise levels, none where they could not be read
    incompatibility: str | None = None  # why no step of this run can be forecast
    version: int | None = None  # how often the source was written to
    # The ways in which the model may be told its S noise levels; narrowed down by what it is told. None: another way.
    told: dict[str, Way] = field(default_factory=dict)
    first_step: int = 0
    starts_late: bool = False  # as what its first call was told says, and nothing else
    step: int = 0  # the latest; before the first call the step that the run begins at
    # Calls of the latest step and of the run, by cache context.
    seen: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    num_steps: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_steps = len(self.sigmas) - 1
        self.step = self.first_step

    def agrees(self, timestep: float, step: int) -> bool:
        """Whether the model is told at a step what it should be, as far as that is known."""
        for way in self.told.values():
            if way.is_near(timestep, step):
                return True
        return not self.told

    def is_nearer(self, timestep: float, step: int, other: int) -> bool:
        """Whether what a model is told is that of one step, and less that of another."""
        return any(
            way.is_near(timestep, step) and abs(timestep - way.told[step]) + _TINY < abs(timestep - way.told[other])
            for way in self.told.values()
            if other < len(way.told)
        )

    def find_step(self, timestep: float, preferred: int) -> int | None:
        """Return the step at which the model is told this, None if none.

        Where several are as near, up to what float32 makes of them: the preferred one.
        """
        steps = [
            (name.startswith("1 - "), round(abs(way.told[step] - timestep), 4), step != preferred, step)
            for name, way in self.told.items()
            for step in range(self.num_steps)
            if way.is_near(timestep, step)
        ]
        return min(steps)[-1] if steps else None

    def follows(self, timestep: float | None, before: float | None) -> bool:
        """Whether what a call is told may come after what another is told, in one run."""
        if timestep is None or before is None:
            return False
        return any((timestep - before) * (way.told[-1] - way.told[0]) >= 0 for way in self.told.values())

    def learn(self, timestep: float, step: int) -> None:
        """Leave out the ways in which the model would be told something else at a step."""
        self.told = {name: way for name, way in self.told.items() if way.is_near(timestep, step)}


def _ways(sigmas: Sequence[float], timesteps: Sequence[float], count: float, is_whole: bool) -> dict[str, Way]:
    """Return what models are told at the S steps in the ways that pipelines have, by a name of the way.

    Args:
        sigmas: the S+1 noise levels.
        timesteps: of the S steps, empty where they are not known.
        count: T, the timesteps of the training.
        is_whole: whether the loop may have a scheduler of whole timesteps beside given sigmas.
    """
    levels = sigmas[:-1]
    shares = [time / count for time in timesteps]
    # Those that are no whole numbers may be told as such, where they go that far.
    is_cut = max(timesteps, default=0.0) > 2 and any(time % 1 for time in timesteps)
    ways = {
        "level": Way(tuple(levels), _tolerances(levels, 0.0)),
        "t / T": Way(tuple(shares), _tolerances(shares, 1 / count if is_whole else 0.0)),
        "t": Way(tuple(timesteps), _tolerances(timesteps, 1.0 if is_cut else 0.0)),
        # What is small here was rounded before.
        "1 - level": Way(tuple(1 - level for level in levels), (_ROUNDING,) * len(levels)),
        "1 - t / T": Way(tuple(1 - share for share in shares), (_ROUNDING,) * len(shares)),
    }
    return {name: way for name, way in ways.items() if len(way.told) == len(levels)}


def _tolerances(told: Sequence[float], rounding: float) -> tuple[float, ...]:
    """Return how far from each number a model may be told it."""
    return tuple(_ROUNDING * abs(each) + rounding for each in told)


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
        # In which of `_ways` the model is told its noise level, once that is certain.
        self._ways: frozenset[str] | None = None
        if self._sigmas is None and not has_index(self._scheduler) and not hasattr(self._scheduler, "timesteps"):
            raise ValueError(
                "lesa: the scheduler must have sigmas and a step_index, or timesteps, "
                f"got {type(self._scheduler).__name__}; pass a bare transformer and sigmas= instead"
            )

    @property
    def has_given_sigmas(self) -> bool:
        """Whether the noise levels are the same in all runs, so that these do not show where one begins."""
        return self._sigmas is not None

    @property
    def pipeline(self) -> Any:
        """The pipeline, None where there is none."""
        return None if self._pipeline is None else self._pipeline()

    def caller(self, model: nn.Module) -> Any:
        """Return the pipeline whose call of the model this is; None where that is not known, or sigmas were given."""
        return None if self._sigmas is not None else _caller(model)

    def owns(self, pipeline: Any) -> bool:
        """Whether a pipeline's runs are those that are followed: those of its scheduler are."""
        return pipeline is self.pipeline or pipeline.scheduler is self._scheduler

    def look(self, context: Any) -> tuple[StepPosition, int | None]:
        """Return the run that a call belongs to and its step; changes nothing.

        The step is that of diffusers' `CacheContext` where it has one, else the scheduler's, else None.
        """
        source, index = self._read()
        position, version = self.position, version_of(source)
        if position is None or position.source is not source or position.version != version:
            position = self._begin(source, version)
        step = index if context.step_index is None else context.step_index
        if step == _NOT_YET:
            step = position.first_step
        if step is None or position is not self.position:
            return position, step
        # A new run brings new sigmas, unless they were given; a step may hold several calls.
        again = self._sigmas is not None and step == position.step and position.seen.get(context.name, 0) > 0
        return (self.begin_again() if step < position.step or again else position), step

    def begin_again(self) -> StepPosition:
        """Return the position of a new run with the present noise levels."""
        source, _ = self._read()
        return self._begin(source, version_of(source))

    def find(
        self,
        position: StepPosition,
        context: Any,
        step: int | None,
        due: int | None,
        timestep: float,
        is_ours: bool = False,
        is_exact: bool = False,
    ) -> tuple[StepPosition, int] | None:
        """Return the run and the step of a call by what its model is told; None where it is no call of this run.

        Args:
            position: of the run.
            context: diffusers' `CacheContext`.
            step: see `look`.
            due: the step at which a branch of the run waits for the call, None where none does.
            timestep: what the model is told.
            is_ours: whether the run's own pipeline makes the call.
            is_exact: whether what the model is told was not rounded to 16 bits.
        """
        if step is None and due == position.step + 1 and is_exact and position.is_nearer(timestep, position.step, due):
            return position, position.step
        expected = step if step is not None else position.step if due is None else due
        if (step is not None or due is not None) and position.agrees(timestep, expected):
            return position, expected
        found = position.find_step(timestep, expected)
        begins, is_fixed = position is not self.position, context.step_index is not None
        if begins and found is not None and not is_fixed and self._read()[1] in (None, _NOT_YET):
            # Its pipeline did not say that it starts late.
            position.first_step = position.step = found
            position.starts_late = True
            return position, found
        if self._ways is None and not position.starts_late and ((begins and found is None) or is_ours):
            # This model is told its noise level in another way.
            position.told = {}
            return position, expected
        if step is not None or found is None:
            return None
        if self._sigmas is not None and found < position.step:
            position = self.begin_again()
            position.first_step = position.step = found
        is_next = found in (position.step, position.step + 1)
        return (position, found) if self._sigmas is not None or is_next else None

    def accept(self, position: StepPosition, step: int, name: str, timestep: float | None = None) -> int:
        """Take a call as one of a run's; return its number within the step and cache context."""
        if timestep is not None and position.told and (self._ways is None or position is not self.position):
            position.learn(timestep, step)
            if step != position.first_step:
                self._ways = frozenset(position.told)
        if step != position.step:
            position.step = step
            position.seen.clear()
        number = position.seen.get(name, 0)
        position.seen[name] = number + 1
        position.calls[name] = position.calls.get(name, 0) + 1
        self.position = position
        return number

    def place(self, context: Any, timestep: float | None) -> tuple[StepPosition, int, int]:
        """Return the run that a call belongs to, its step, and its number within the step and context.

        The step is that of `look`, else the context's calls are counted. It is not below S where there were too many.

        Args:
            context: diffusers' `CacheContext`.
            timestep: what the model is told, which shows where a run begins; None where it is told no number.
        """
        position, step = self.look(context)
        if step is None:
            # A context that joins late joins at the step of the others.
            step = position.calls.setdefault(context.name, position.step)
        if timestep is not None and position is not self.position:
            position, step = self.find(position, context, step, None, timestep) or (position, step)
        return position, step, self.accept(position, step, context.name)

    def solver_incompatibility(self) -> str | None:
        """Say why the scheduler's steps are not those of a learned solver, None where nothing is known."""
        return scheduler_incompatibility(self._scheduler)

    def read_levels(self) -> Levels:
        """Return what the run that begins is made of; on a GPU this is the one wait of a run."""
        return read_levels(self._scheduler) if self._sigmas is None else Levels(self._sigmas)

    def _read(self) -> tuple[Any, int | None]:
        """Return the object that holds the levels, and the scheduler's step.

        That is `_NOT_YET` before the scheduler's first step, and None where calls are counted.
        """
        if self._sigmas is not None:
            return self._sigmas, None
        if (pipeline := self.pipeline) is not None:
            self._scheduler = pipeline.scheduler
        scheduler = self._scheduler
        if not has_index(scheduler):
            return scheduler.timesteps, None
        index = scheduler.step_index
        return scheduler.sigmas, _NOT_YET if index is None else int(index)

    def _begin(self, source: Any, version: int | None) -> StepPosition:
        """Return the position of a run that begins."""
        levels, count = self.read_levels(), float(_TIMESTEPS)
        timesteps = levels.timesteps
        if self._sigmas is None:
            count = float(getattr(getattr(self._scheduler, "config", None), "num_train_timesteps", count))
        else:
            timesteps = tuple(sigma * count for sigma in levels.sigmas[:-1])
        ways = {}
        if levels.incompatibility is None:
            ways = _ways(levels.sigmas, timesteps, count, self._sigmas is not None)
        told = {name: way for name, way in ways.items() if self._ways is None or name in self._ways}
        # Schedulers set their index in step(), after the first call of the model; image-to-image begins late.
        begin = getattr(self._scheduler, "begin_index", None) if self._sigmas is None else None
        return StepPosition(source, levels.sigmas, levels.incompatibility, version, told, int(begin or 0))


def find_disagreement(position: StepPosition, context: Any, step: int) -> str | None:
    """Say how a call contradicts the noise levels of the run that it was found to be in, None if it does not."""
    if position.incompatibility is not None:
        return None
    if not 0 <= step < position.num_steps:
        return f"step {step} came in a schedule of {position.num_steps} steps"
    sigma, total = context.sigma, context.num_inference_steps
    if total is not None and total != position.num_steps:
        return f"the cache context counts {total} steps, the sigmas {position.num_steps}"
    if isinstance(sigma, float) and not math.isclose(sigma, position.sigmas[step], abs_tol=_SIGMA_TOLERANCE):
        return f"the cache context says sigma {sigma} at step {step}, the sigmas say {position.sigmas[step]}"
    return None


def find_incompatibility(position: StepPosition, step: int, number: int, other_cache: str | None) -> str | None:
    """Say why no call of this run can be forecast from here on, None if they can.

    Args:
        position: of the run.
        step: of the call.
        number: of the call within its step and cache context.
        other_cache: what else answers calls of the model.
    """
    if torch.is_grad_enabled():
        return "gradients are enabled; sample under torch.no_grad()"
    if other_cache is not None:
        return other_cache
    if position.incompatibility is not None:
        return position.incompatibility
    if number >= _MAX_CALLS:
        return f"call {number + 1} of step {step} came; does the loop call scheduler.step?"
    return None


def _caller(model: nn.Module) -> Any:
    """Return the pipeline that calls a model, None where a loop does that is in no pipeline's `__call__`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            held = [getattr(caller, name, None) for name in TRANSFORMERS] if hasattr(caller, "scheduler") else []
            if any(each is model or getattr(each, "_orig_mod", None) is model for each in held if each is not None):
                return caller
        frame = frame.f_back
    return None

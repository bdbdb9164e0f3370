"""Where the denoising loop is, and on which noise levels: told by Python integers and by who holds the sigmas."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from lesa_kernels.checks import check_decreasing

# Flow matching goes from 1 to 0; the sigmas of other schedulers go far beyond, on another scale.
_MAX_FLOW_SIGMA = 1.001


class Clock:
    """Reads step index and noise levels; no tensor value is read but these levels, once a run.

    The levels are the scheduler's sigmas under flow matching. Of another scheduler (DDIM, DPM-Solver, ...) they are its
    timesteps, scaled to (0, 1], and 0: its sigmas, where it has any, span orders of magnitude.

    Args:
        pipeline: whose scheduler counts (it is looked up at every call, as users replace it), or None.
        scheduler: a diffusers scheduler, or None.
        sigmas: S+1 noise levels where there is no scheduler, or None.

    Raises:
        ValueError: when none or several are given, or the scheduler has no sigmas, or the sigmas do not fall.
    """

    def __init__(self, pipeline: Any = None, scheduler: Any = None, sigmas: Sequence[float] | None = None) -> None:
        given = [
            name
            for name, value in (("pipeline", pipeline), ("scheduler", scheduler), ("sigmas", sigmas))
            if value is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "lesa: exactly one of a pipeline, scheduler= and sigmas= must tell the steps of the run, "
                f"got {' and '.join(given) or 'none'}"
            )
        # A strong reference would keep the pipeline's text encoders alive as long as its transformer.
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._scheduler = scheduler if pipeline is None else pipeline.scheduler
        self._sigmas = None if sigmas is None else check_decreasing(sigmas)
        if self._sigmas is None and not hasattr(self._scheduler, "sigmas" if self.has_index else "timesteps"):
            raise ValueError(
                "lesa: the scheduler must have sigmas and a step_index, or timesteps, "
                f"got {type(self._scheduler).__name__}; pass a bare transformer and sigmas= instead"
            )

    @property
    def has_scheduler(self) -> bool:
        """Whether a scheduler counts the steps: then a new run brings new sigmas, and a step may hold several calls."""
        return self._sigmas is None

    @property
    def has_index(self) -> bool:
        """Whether the scheduler tells the step; else calls are counted."""
        scheduler = self.scheduler()
        return hasattr(scheduler, "sigmas") and hasattr(scheduler, "step_index")

    def scheduler(self) -> Any:
        """Return the scheduler of this moment, None where the sigmas were given."""
        pipeline = self._pipeline() if self._pipeline is not None else None
        if pipeline is not None:
            self._scheduler = pipeline.scheduler
        return self._scheduler

    def source(self) -> Any:
        """Return the object that holds the levels; schedulers make a new one for every run."""
        if self._sigmas is not None:
            return self._sigmas
        return self.scheduler().sigmas if self.has_index else self.scheduler().timesteps

    def levels(self) -> tuple[float, ...]:
        """Return the S+1 noise levels of the run that begins.

        Raises:
            TypeError: when the scheduler was not told its steps yet.
        """
        if self._sigmas is not None:
            return self._sigmas
        scheduler = self.scheduler()
        if self.has_index:
            sigmas = read_sigmas(scheduler.sigmas)
            if max(sigmas) <= _MAX_FLOW_SIGMA:
                return sigmas
        # Counted from 1: the last timestep may be 0, and its level must lie above the end of the run.
        return (*((t + 1) / scheduler.config.num_train_timesteps for t in read_sigmas(scheduler.timesteps)), 0.0)

    def step(self, context_step: int | None, calls: int, num_steps: int) -> int:
        """Return the step of a call.

        Args:
            context_step: what the cache context says, which counts; else the scheduler's index does.
            calls: how many calls the context has had in this run: they count where nothing else does.
            num_steps: S.

        Returns:
            The step; not below S where there were too many calls.
        """
        if context_step is not None:
            return context_step
        if self._sigmas is not None:
            return calls
        scheduler = self.scheduler()
        if not self.has_index:
            # A pipeline that starts late says how many steps are left.
            pipeline = self._pipeline() if self._pipeline is not None else None
            left = getattr(pipeline, "_num_timesteps", None) or num_steps
            return calls + max(num_steps - left, 0)
        # Schedulers set their index in step(), after the first call of the model; image-to-image begins late.
        if scheduler.step_index is None:
            return getattr(scheduler, "begin_index", None) or 0
        return int(scheduler.step_index)


def read_sigmas(source: Any) -> tuple[float, ...]:
    """Return noise levels as Python floats; for a tensor on a GPU this is the one wait of a run."""
    values = source.tolist() if hasattr(source, "tolist") else source
    return tuple(float(value) for value in values)


@dataclass
class Position:
    """Where one pass through a schedule is.

    Args:
        source: the object that held the sigmas; another object means another run.
        sigmas: their values.
        step: the latest step.
        seen: calls of the latest step, by cache context.
        calls: calls of the run, by cache context.
    """

    source: Any
    sigmas: tuple[float, ...]
    step: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def num_steps(self) -> int:
        """S."""
        return len(self.sigmas) - 1

    def count(self, name: str, step: int) -> int:
        """Note a call and return its number within its step and context."""
        if step != self.step:
            self.step = step
            self.seen.clear()
        number = self.seen[name]
        self.seen[name] += 1
        self.calls[name] += 1
        return number


_Position = TypeVar("_Position", bound=Position)


class Follower(Generic[_Position]):
    """Follows a model from call to call; a new run begins where the clock has new sigmas or the step goes back.

    Args:
        clock: tells step and sigmas.
        begin: makes the position of a run that begins, from the object that holds its sigmas.
    """

    def __init__(self, clock: Clock, begin: Callable[[Any], _Position]) -> None:
        self._clock = clock
        self._begin = begin
        self.position: _Position | None = None

    def place(self, context: Any) -> tuple[_Position, int, int]:
        """Place a call.

        Args:
            context: diffusers' `CacheContext`.

        Returns:
            The run that it belongs to, its step, and its number within the step and context.
        """
        source, run = self._clock.source(), self.position
        if run is None or run.source is not source:
            run = self._begin(source)
        # A context that joins late joins at the step of the others.
        calls = run.calls.setdefault(context.name, run.step)
        step = self._clock.step(context.step_index, calls, run.num_steps)
        if self._clock.has_scheduler:
            again = self._clock.has_index and step < run.step
        elif context.step_index is None:
            again = step >= run.num_steps
        else:
            again = step < run.step or (step == run.step and run.seen[context.name] > 0)
        if again:
            run = self._begin(source)
            step = self._clock.step(context.step_index, 0, run.num_steps)
        self.position = run
        return run, step, run.count(context.name, step)

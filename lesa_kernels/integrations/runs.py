"""The sampling runs of one model: which call is which step, what is due on it, and when to stop guessing."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from lesa_kernels.integrations.clock import Clock, read_sigmas
from lesa_kernels.plan import Plan
from lesa_kernels.predictors import Forecaster
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.session import Session

# Guidance makes two to four calls a step; more mean that the scheduler's step index stands still.
_MAX_CALLS = 4
# Sigmas pass through float32 on their way into a cache context.
_SIGMA_TOLERANCE = 1e-5
_MAX_PLANS = 8


_Function = TypeVar("_Function", bound=Callable[..., Any])


def uncompiled(recursive: bool = True) -> Callable[[_Function], _Function]:
    """Keep a function out of the graphs of torch.compile, and with `recursive` all that it calls."""
    decorator: Callable[[_Function], _Function] = torch.compiler.disable(recursive=recursive)
    return decorator


class LesaWarning(UserWarning):
    """Something unexpected: the rest of the run is sampled without forecasts. The message says why."""


@dataclass
class Summary:
    """What became of the last run.

    Args:
        steps: S, the steps of its schedule.
        full: calls of the model that ran its blocks, over all cache contexts.
        forecast: calls that skipped them.
        plan: the plan as text, empty where none could be made.
        history_bytes: memory of the rings while it ran.
        refused: why the run went on without forecasts, None where nothing was unexpected.
    """

    steps: int
    full: int = 0
    forecast: int = 0
    plan: str = ""
    history_bytes: int = 0
    refused: str | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.steps} steps: {self.full} calls full, {self.forecast} forecast",
            f"history: {self.history_bytes / 2**20:.1f} MiB",
        ]
        lines += [f"without forecasts from some step on: {self.refused}"] if self.refused else []
        return "\n".join(lines + ([self.plan] if self.plan else []))


@dataclass
class Track:
    """One stream of calls within a run: a cache context's, or those of the n-th call of each step.

    Args:
        run: the run.
        session: its history.
        layout: shape, dtype and device of the latents.
        step: the step of the present call, and after it the step that is due.
        captured: whether the present full step handed in its feature.
    """

    run: Run
    session: Session
    layout: tuple[Any, ...]
    step: int
    captured: bool = False

    @property
    def is_full(self) -> bool:
        """Whether the plan makes the present step full."""
        return self.session.plan.is_full(self.step)

    @uncompiled()
    def capture(self, feature: Tensor) -> None:
        """Take the feature of a full step."""
        self.captured = True
        known = self.session.ring is not None
        try:
            self.session.push(self.step, feature)
        except ValueError as error:
            self.run.refuse(str(error))
            return
        if not known and self.session.ring is not None:
            self.run.summary.history_bytes += self.session.ring.nbytes

    @uncompiled()
    def forecast(self) -> Tensor:
        """Return the feature of a forecast step, a view of the history."""
        return self.session.forecast(self.step)


@dataclass
class Run:
    """One pass through a schedule.

    Args:
        source: the object that held the sigmas; another object means another run.
        sigmas: their values.
        summary: what became of it so far.
        step: the latest step.
        seen: calls of the latest step, by cache context.
        calls: calls of the run, by cache context.
        tracks: by cache context and number of the call within its step.
    """

    source: Any
    sigmas: tuple[float, ...]
    summary: Summary
    step: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    tracks: dict[tuple[str, int], Track] = field(default_factory=dict)

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

    def refuse(self, reason: str) -> None:
        """Run full steps from here on, give the history's memory back, and warn once."""
        if self.summary.refused is not None:
            return
        self.summary.refused = reason
        self.tracks.clear()
        warnings.warn(f"lesa: full steps for the rest of this run: {reason}", LesaWarning, stacklevel=2)


class Runs:
    """Follows a model from call to call and decides, from Python integers alone, what each one is.

    A new run begins where the scheduler has new sigmas or the step goes back. A context that joins late
    (image-to-image, guidance that starts in the middle) is planned from its first step on.

    Args:
        clock: tells step and sigmas.
        predictor: makes the plans; they are kept by sigmas, so a predictor must not change while it is enabled.
        schedule: full steps, or a rule that makes them from the sigmas.
    """

    def __init__(self, clock: Clock, predictor: Forecaster, schedule: Schedule | ScheduleRule) -> None:
        self._clock = clock
        self._run: Run | None = None
        self.summary: Summary | None = None

        def make(sigmas: tuple[float, ...], first_step: int) -> Plan:
            return predictor.plan(sigmas, schedule, first_step=first_step)

        self._plan: Callable[[tuple[float, ...], int], Plan] = lru_cache(_MAX_PLANS)(make)

    def forget(self) -> None:
        """Drop the present run and its history; the next call begins a new one."""
        self._run = None

    @uncompiled()
    def enter(self, context: Any, latents: Tensor, foreign_cache: bool) -> Track | None:
        """Place a call of the model.

        Args:
            context: diffusers' `CacheContext`.
            latents: the model's first argument.
            foreign_cache: whether a cache of diffusers is on too.

        Returns:
            The track whose step this is, or None where the call runs in full and nothing is captured.
        """
        run, step, number = self._place(context)
        if run.summary.refused is not None:
            return None
        layout = (tuple(latents.shape), latents.dtype, latents.device)
        track = run.tracks.get((context.name, number))
        reason = _objection(run, context, step, number, foreign_cache) or _objection_of(track, step, layout)
        if reason is not None:
            run.refuse(reason)
            return None
        if track is None:
            try:
                plan = self._plan(run.sigmas, step)
            except ValueError as error:
                run.refuse(str(error))
                return None
            run.summary.plan = run.summary.plan or str(plan)
            track = run.tracks[context.name, number] = Track(run, Session(plan), layout, step)
        track.captured = False
        return track

    @uncompiled()
    def leave(self, track: Track | None) -> None:
        """Close the call that `enter` placed: count it, and give the history back after the last step."""
        run = self._run
        if run is None:
            return
        if track is None or track.is_full:
            run.summary.full += 1
        else:
            run.summary.forecast += 1
        if track is None:
            return
        if track.is_full and not track.captured:
            run.refuse("the model's forward did not reach the point where its feature is captured")
        track.step += 1
        if track.step == run.num_steps:
            run.tracks = {key: other for key, other in run.tracks.items() if other is not track}

    def _place(self, context: Any) -> tuple[Run, int, int]:
        """Find the run of a call, its step, and its number within the step."""
        source, step, run = self._clock.source(), self._clock.step(context.step_index), self._run
        if run is None or run.source is not source:
            run = self._start(source)
        if step is None:
            step = run.calls[context.name]
            if step >= run.num_steps:
                run, step = self._start(source), 0
        elif step < run.step or (not self._clock.has_scheduler and step == run.step and run.seen[context.name]):
            run = self._start(source)
        return run, step, run.count(context.name, step)

    def _start(self, source: Any) -> Run:
        sigmas = read_sigmas(source)
        self.summary = Summary(steps=len(sigmas) - 1)
        self._run = Run(source, sigmas, self.summary)
        return self._run


def _objection(run: Run, context: Any, step: int, number: int, foreign_cache: bool) -> str | None:
    """Say what about a call speaks against forecasts, None if nothing does."""
    if torch.is_grad_enabled():
        return "gradients are enabled; sample under torch.no_grad()"
    if foreign_cache:
        return "a cache of diffusers is enabled on the model as well"
    if not 0 <= step < run.num_steps:
        return f"step {step} came in a schedule of {run.num_steps} steps"
    if number >= _MAX_CALLS:
        return f"call {number + 1} of step {step} came; does the loop call scheduler.step?"
    if len(set(run.sigmas)) < len(run.sigmas):
        return "the scheduler's sigmas repeat, as those of second-order schedulers do"
    sigma, total = context.sigma, context.num_inference_steps
    if total is not None and total != run.num_steps:
        return f"the cache context counts {total} steps, the sigmas {run.num_steps}"
    if isinstance(sigma, float) and not math.isclose(sigma, run.sigmas[step], abs_tol=_SIGMA_TOLERANCE):
        return f"the cache context says sigma {sigma} at step {step}, the sigmas say {run.sigmas[step]}"
    return None


def _objection_of(track: Track | None, step: int, layout: tuple[Any, ...]) -> str | None:
    """Say what makes a call unfit to follow the one before it in its track, None if nothing does."""
    if track is None:
        return None
    if step != track.step:
        return f"step {step} came where step {track.step} was due"
    if layout != track.layout:
        return f"the latents changed from {track.layout} to {layout}"
    return None

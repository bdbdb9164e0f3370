"""The sampling runs of one model: which call is which step, what is due on it, and when to stop guessing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lesa_kernels.checks import check_decreasing
from lesa_kernels.integrations.clock import Clock, Follower, Position
from lesa_kernels.integrations.outputs import Layout, layout_of, uncompiled
from lesa_kernels.integrations.summaries import Summary, Tally
from lesa_kernels.plan import Plan, check_count
from lesa_kernels.predictors import Predictor
from lesa_kernels.predictors.base import OnOtherSigmas
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.session import Session, check_history

# Guidance makes two to four calls a step; more mean that the scheduler's step index stands still.
_MAX_CALLS = 4
# Sigmas pass through float32 on their way into a cache context.
_SIGMA_TOLERANCE = 1e-5
_MAX_PLANS = 16

Predictors: TypeAlias = "Predictor | Mapping[str, Predictor]"
"""One predictor for all cache contexts, or those of each by its name."""


def default_schedule(sigmas: Sequence[float]) -> Schedule:
    """The schedule of `enable` without one: a fifth of the steps, rounded up, at least three; uniform in sigma.

    Args:
        sigmas: S+1 falling noise levels.

    Returns:
        The schedule.

    Raises:
        ValueError: when the sigmas do not fall.
    """
    levels = check_decreasing(sigmas)
    steps = len(levels) - 1
    return Schedule.uniform_in_sigma(levels, num_full=min(steps, max(3, -(-steps // 5))))


class LesaWarning(UserWarning):
    """Something that a user should know of a run; most often that its rest is sampled without forecasts, and why."""


@dataclass(frozen=True)
class Options:
    """How runs are made; see `lesa.enable`."""

    history_dtype: torch.dtype | None = None
    on_other_sigmas: OnOtherSigmas = "refuse"
    chunk: int | None = None
    check_every: int | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        check_history(self.history_dtype)
        if self.on_other_sigmas not in ("refuse", "adapt"):
            raise ValueError(f'on_other_sigmas must be "refuse" or "adapt", got {self.on_other_sigmas!r}')
        check_count("chunk", self.chunk)
        check_count("check_every", self.check_every)
        if self.max_error is None:
            return
        if isinstance(self.max_error, bool) or not isinstance(self.max_error, int | float):
            raise TypeError(f"max_error must be a number or None, got {self.max_error!r}")
        if not self.max_error > 0:
            raise ValueError(f"max_error must be greater than 0, got {self.max_error}")
        if self.check_every is None:
            raise ValueError(
                f"max_error must come with check_every, which says when it is looked at, got {self.max_error}"
            )


@dataclass
class Track:
    """One stream of calls within a run: a cache context's, or those of the n-th call of each step.

    Args:
        run: the run.
        session: its history.
        layout: shape, dtype and device of the latents.
        step: the step of the present call, and after it the step that is due.
        feature: the forecast of the present step.
    """

    run: Run
    session: Session
    layout: Layout
    step: int
    feature: Tensor | None = None

    @property
    def is_full(self) -> bool:
        """Whether the plan makes the present step full."""
        return self.session.plan.is_full(self.step)

    @uncompiled()
    def capture(self, feature: Tensor) -> None:
        """Take the feature of a full step; what cannot be kept ends the forecasts, not the run."""
        known = self.session.ring is not None
        try:
            self.session.push(self.step, feature)
        except (ValueError, TypeError, RuntimeError) as error:
            self.run.refuse(f"the feature of step {self.step} could not be kept: {error}")
            return
        if self.step in self.session.errors:
            self.run.take_error(self.step, self.session.errors[self.step])
        if not known and self.session.ring is not None:
            self.run.tally.note_ring(self.session.ring)

    @uncompiled()
    def forecast(self) -> Tensor:
        """Return the feature of a forecast step, which may be a view of the history."""
        feature, self.feature = self.feature, None
        if feature is None:
            raise RuntimeError(f"there is no forecast of step {self.step}")
        return feature


@dataclass(kw_only=True)
class Run(Position):
    """One pass through a schedule.

    Args:
        tally: what became of it so far.
        max_error: beyond which error of a checked step the rest of the run is full, None for no limit.
        tracks: by cache context and number of the call within its step.
        warned: what was said already.
    """

    tally: Tally
    max_error: float | None = None
    tracks: dict[tuple[str, int], Track] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def warn(self, text: str) -> None:
        """Say something once a run."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(f"lesa: {text}", LesaWarning, stacklevel=2)

    def refuse(self, reason: str) -> None:
        """Run full steps from here on, give the history's memory back, and warn once."""
        if self.tally.refused is None:
            self.tally.refused = reason
            self.give_back()
            self.warn(f"full steps for the rest of this run: {reason}")

    def take_error(self, step: int, error: Tensor) -> None:
        """Note how far a full step was from what it would have been forecast; only a limit waits for the number."""
        self.tally.errors.append((step, error))
        # A NaN is within no limit.
        if self.max_error is not None and not float(error) <= self.max_error:
            self.refuse(
                f"step {step} would have been forecast with an error of {float(error):.3g}, "
                f"more than max_error = {self.max_error:g}"
            )

    def give_back(self, finished: Track | None = None) -> None:
        """Drop the history of a track that has finished, or all of it."""
        for key, track in list(self.tracks.items()):
            if finished is None or track is finished:
                del self.tracks[key]


class Runs:
    """Follows a model from call to call and decides, from Python integers alone, what each one is.

    A context that joins late (image-to-image, guidance that starts in the middle) is planned from its first step on.

    Args:
        clock: tells step and sigmas.
        predictors: make the plans, which are kept by sigmas: a predictor must not change while it is enabled.
        schedule: full steps, or a rule that makes them from the sigmas; None: see `enable`.
        options: how.
        blocks: calls of blocks in a full call of the model.
    """

    def __init__(
        self,
        clock: Clock,
        predictors: Predictors,
        schedule: Schedule | ScheduleRule | None,
        options: Options | None = None,
        blocks: int = 0,
    ) -> None:
        self._clock = clock
        self._predictors = predictors
        self._schedule = schedule
        self._options = options or Options()
        self._blocks = blocks
        self._follower = Follower(clock, self._start)
        self._tally: Tally | None = None
        # Those of the other models of the pipeline, which take turns with this one.
        self.siblings: tuple[Runs, ...] = ()

        def make(branch: str, sigmas: tuple[float, ...], first_step: int) -> Plan:
            predictor = self._predictor(branch)
            placement = schedule or predictor.schedule or default_schedule
            return predictor.plan(
                sigmas,
                placement,
                first_step=first_step,
                chunk=self._options.chunk,
                check_every=self._options.check_every,
                on_other_sigmas=self._options.on_other_sigmas,
            )

        self._plan: Callable[[str, tuple[float, ...], int], Plan] = lru_cache(_MAX_PLANS)(make)

    @property
    def summary(self) -> Summary | None:
        """What became of the last run, None before the first; waits for the device to finish what was measured."""
        return None if self._tally is None else self._tally.summary()

    def forget(self) -> None:
        """Drop the present run and its history; the next call begins a new one."""
        if self._follower.position is not None:
            self._follower.position.give_back()
        self._follower.position = None

    @uncompiled()
    def enter(self, context: Any, latents: Any, foreign_cache: bool) -> Track | None:
        """Place a call of the model.

        Args:
            context: diffusers' `CacheContext`.
            latents: the model's first argument.
            foreign_cache: whether a cache of diffusers is on too.

        Returns:
            The track whose step this is, or None where the call runs in full and nothing is captured.
        """
        layout = layout_of(latents)
        run, track = self._track(context, layout, foreign_cache)
        if track is not None and not track.is_full:
            run.tally.forecast.start(layout[-1])
            try:
                track.feature = track.session.forecast(track.step)
                return track
            except RuntimeError as error:
                run.refuse(f"the feature of step {track.step} could not be forecast: {error}")
                track = None
        run.tally.full.start(layout[-1])
        return track

    @uncompiled()
    def leave(self, track: Track | None) -> None:
        """Close the call that `enter` placed: count it, and give the history back after the last step."""
        run = self._follower.position
        if run is None:
            return
        if track is None:
            run.tally.full.stop()
            return
        (run.tally.full if track.is_full else run.tally.forecast).stop()
        track.step += 1
        if track.step == run.num_steps and run.tracks:
            # Guidance may have ended before the run did.
            ended = [each for each in run.tracks.values() if each.step < run.num_steps - 1]
            for each in (track, *ended):
                run.give_back(each)

    def _track(self, context: Any, layout: Layout, foreign_cache: bool) -> tuple[Run, Track | None]:
        """Find the track of a call, None where the call is full and stands alone."""
        run, step, number = self._follower.place(context)
        if run.tally.refused is not None:
            return run, None
        track = run.tracks.get((context.name, number))
        reason = objection_to(run, context, step, number, foreign_cache) or _objection_of(track, step, layout)
        if reason is not None:
            run.refuse(reason)
            return run, None
        if track is None:
            branch = branch_of(self._predictors, context.name)
            if branch is None:
                run.warn(_no_predictor(self._predictors, context.name))
                return run, None
            try:
                plan = self._plan(branch, run.sigmas, step)
                objection = self._predictor(branch).objection(run.sigmas)
            # Users bring their own predictors and rules, and no fault of theirs should cost an image.
            except Exception as error:
                run.refuse(str(error) if isinstance(error, ValueError) else repr(error))
                return run, None
            if objection is not None:
                run.warn(f"{objection}; it is used all the same, as on_other_sigmas says")
            session = Session(plan, history_dtype=self._options.history_dtype)
            run.tally.plan = run.tally.plan or str(session.plan)
            track = run.tracks[context.name, number] = Track(run, session, layout, step)
        return run, track

    def _predictor(self, branch: str) -> Predictor:
        return self._predictors if isinstance(self._predictors, Predictor) else self._predictors[branch]

    def _start(self, source: Any) -> Run:
        # What a run that was broken off held would live on until the cyclic garbage collection.
        for runs in (self, *self.siblings):
            if runs._follower.position is not None:
                runs._follower.position.give_back()
        for sibling in self.siblings:
            if sibling._follower.position is None or sibling._follower.position.source is not source:
                # The summary tells of one run, in which a sibling may have no turn.
                sibling._tally = None
        sigmas: tuple[float, ...] = ()
        reason = None
        try:
            sigmas = self._clock.levels()
        # Whatever a scheduler holds before it was told its steps.
        except (TypeError, ValueError) as error:
            reason = f"the scheduler's noise levels cannot be read: {error}"
        self._tally = Tally(steps=max(len(sigmas) - 1, 0), blocks=self._blocks)
        run = Run(source, sigmas, tally=self._tally, max_error=self._options.max_error)
        if reason is not None:
            run.refuse(reason)
        return run


def branch_of(predictors: Predictors, context: str) -> str | None:
    """Return the name under which a cache context finds its predictor; None where there is none for it.

    A pipeline that opens no context has an unnamed one. A predictor for "cond" alone serves it: nothing says that a
    call is of another branch.
    """
    if isinstance(predictors, Predictor):
        return ""
    if context in predictors:
        return context
    return "cond" if not context and tuple(predictors) == ("cond",) else None


def _no_predictor(predictors: Predictors, context: str) -> str:
    names = [] if isinstance(predictors, Predictor) else sorted(predictors)
    if not context:
        return f"full steps: the pipeline opens no cache context that would tell which of the predictors {names} is due"
    return f"full steps for the cache context {context!r}: there are predictors for {names} alone"


def objection_to(run: Position, context: Any, step: int, number: int, foreign_cache: bool) -> str | None:
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


def _objection_of(track: Track | None, step: int, layout: Layout) -> str | None:
    """Say what makes a call unfit to follow the one before it in its track, None if nothing does."""
    if track is None:
        return None
    if step != track.step:
        return f"step {step} came where step {track.step} was due"
    if layout != track.layout:
        return f"the latents changed from {track.layout} to {layout}"
    return None

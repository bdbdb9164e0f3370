"""Keeps the state of a model's sampling runs: the plan and the history of each branch, and whether to forecast at all.

A run is one pass through a schedule. A branch is one stream of calls within it: those of a cache context ("cond",
"uncond", ...), or, where one context makes several calls a step, the n-th calls.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lesa_kernels.checks import check_decreasing, check_float
from lesa_kernels.integrations.halves import HalvesSession, are_equal_halves
from lesa_kernels.integrations.outputs import Layout, layout_of, uncompiled
from lesa_kernels.integrations.solver_run import SolverRun
from lesa_kernels.integrations.stats import RunStats
from lesa_kernels.integrations.steps import (
    StepPosition,
    StepTracker,
    call_name,
    find_incompatibility,
    scheduler_incompatibility,
)
from lesa_kernels.plan import Plan, check_count
from lesa_kernels.predictors import Predictor, SolverPredictor, TaylorSeer
from lesa_kernels.predictors.base import OnOtherSigmas
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.session import Session, check_history
from lesa_kernels.trajectories import HALVES, ONLY_BRANCH

_MAX_PLANS = 16
# The name of a predictor for all cache contexts, and of what takes its place where a run starts elsewhere.
_SHARED, _FALLBACK = "", "training-free"

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


def default_predictor() -> Predictor:
    """The predictor of `enable` without one; it needs no training."""
    return TaylorSeer(order=1, variable="sigma")


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
        if self.max_error is not None:
            check_float("max_error", self.max_error, above=0, finite=False)
            if self.check_every is None:
                raise ValueError(
                    f"max_error must come with check_every, which says when it is looked at, got {self.max_error}"
                )


@dataclass
class BranchState:
    """The history of one branch; with a learned solver all branches share one."""

    name: str  # of its calls
    session: Session | HalvesSession
    full_steps: frozenset[int]
    layout: Layout  # of the latents
    step: int  # of the present call, and after it the step that is due
    feature: Tensor | None = None  # the forecast of the present step, a view of the history; None on a full step
    solver: SolverRun | None = None
    output: Any = None  # the solver's answer in the present step; None on a full step


@dataclass
class RunState:
    """One pass through a schedule."""

    position: StepPosition
    stats: RunStats
    # By cache context and number of the call within its step.
    branches: dict[tuple[str, int], BranchState] = field(default_factory=dict)
    solver: SolverRun | None = None
    warned: set[str] = field(default_factory=set)

    def warn(self, text: str) -> None:
        """Warn of something once a run."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(f"lesa: {text}", LesaWarning, stacklevel=2)

    def release(self) -> None:
        """Release the histories."""
        self.branches.clear()
        self.solver = None

    def disable_forecasts(self, reason: str) -> None:
        """Run full steps from here on, release the history's memory, and warn once."""
        if self.stats.refused is None:
            self.stats.refused = reason if self.solver is None else reason + self.solver.caveat
            self.release()
            self.warn(f"full steps for the rest of this run: {self.stats.refused}")


class CacheState:
    """Follows the calls of one model and decides, from Python integers alone, which are forecast.

    A branch that begins late (image-to-image, guidance that starts in the middle) is planned from its first step on.
    Plans are kept by sigmas: a predictor must not change while it is enabled. `blocks` is how many a full call runs.
    """

    def __init__(
        self,
        tracker: StepTracker,
        predictors: Predictors,
        schedule: Schedule | ScheduleRule | None,
        options: Options,
        blocks: int,
    ) -> None:
        self._tracker = tracker
        self._is_shared = isinstance(predictors, Predictor)
        self._predictors = {_SHARED: predictors} if isinstance(predictors, Predictor) else dict(predictors)
        self._has_solver = isinstance(predictors, SolverPredictor)
        self._options = options
        self._blocks = blocks
        self._run: RunState | None = None
        # Of the last run; None before the first, and where a run had no turn of this model.
        self.stats: RunStats | None = None
        # Those of the other models of the pipeline, which take turns with this one.
        self.siblings: tuple[CacheState, ...] = ()

        def make_plan(name: str, sigmas: tuple[float, ...], first_step: int) -> Plan:
            if name == _FALLBACK:
                return default_predictor().plan(sigmas, default_schedule, first_step=first_step, chunk=options.chunk)
            predictor = self._predictors[name]
            return predictor.plan(
                sigmas,
                schedule or predictor.schedule or default_schedule,
                first_step=first_step,
                chunk=options.chunk,
                check_every=options.check_every,
                on_other_sigmas=options.on_other_sigmas,
            )

        self._plan: Callable[[str, tuple[float, ...], int], Plan] = lru_cache(_MAX_PLANS)(make_plan)

    def reset(self) -> None:
        """Drop the present run and its history; the next call begins a new one."""
        if self._run is not None:
            # The traceback of an error may keep the run itself alive.
            self._run.release()
        self._run = self._tracker.position = None

    @uncompiled()
    def enter(self, context: Any, latents: Any, foreign_cache: bool) -> BranchState | None:
        """Return the branch of a call, with its forecast where one is due; None where nothing is to be captured.

        `context` is diffusers' `CacheContext`, `latents` the model's first argument; `foreign_cache` says whether a
        cache of diffusers is on too.
        """
        layout = layout_of(latents)
        run, branch = self._place(context, latents, layout, foreign_cache)
        solver = None if branch is None else branch.solver
        if branch is not None and solver is not None:
            reason = _reason(solver.arrive, branch.step, latents)
            if reason is not None:
                run.disable_forecasts(reason)
                branch = None
            elif (ring := solver.session.ring) is not None and not run.stats.history_bytes:
                run.stats.add_ring(ring)
        if branch is not None and branch.step not in branch.full_steps:
            run.stats.forecast.start(layout[-1])
            try:
                if branch.solver is None:
                    branch.feature = branch.session.forecast(branch.step)
                else:
                    branch.output = branch.solver.answer(branch.step)
                return branch
            except RuntimeError as error:
                run.disable_forecasts(f"the feature of step {branch.step} could not be forecast: {error}")
                branch = None
        run.stats.full.start(layout[-1])
        return branch

    @uncompiled()
    def capture_output(self, branch: BranchState, latents: Any, output: Any) -> None:
        """Keep the output of a full step for a learned solver; see `capture`."""
        run, solver = self._run, branch.solver
        if run is None or solver is None or run.stats.refused is not None:
            return
        reason = _reason(solver.capture, branch.step, branch.name, latents, output)
        if reason is not None:
            run.disable_forecasts(reason)

    @uncompiled()
    def capture(self, branch: BranchState, feature: Tensor) -> None:
        """Keep the feature of a full step; a failure ends the forecasts, not the run."""
        run, session, step = self._run, branch.session, branch.step
        if run is None:
            return
        sessions = session.sessions if isinstance(session, HalvesSession) else (session,)
        unknown = [each for each in sessions if each.ring is None]
        try:
            session.push(step, feature)
        except (ValueError, TypeError, RuntimeError) as error:
            run.disable_forecasts(f"the feature of step {step} could not be kept: {error}")
            return
        for each in unknown:
            if each.ring is not None:
                run.stats.add_ring(each.ring)
        measured, limit = session.errors.get(step), self._options.max_error
        if measured is not None:
            run.stats.errors.append((step, measured))
            # Only a limit waits for the number; a NaN is within none.
            if limit is not None and not float(measured) <= limit:
                run.disable_forecasts(
                    f"step {step} would have been forecast with an error of {float(measured):.3g}, "
                    f"more than max_error = {limit:g}"
                )

    @uncompiled()
    def leave(self, branch: BranchState | None) -> None:
        """Close the call that `enter` placed: count it, and release the history after the last step."""
        run = self._run
        if run is None:
            return
        if branch is None:
            run.stats.full.stop()
            return
        is_full = branch.feature is None and branch.output is None
        (run.stats.full if is_full else run.stats.forecast).stop()
        branch.feature = branch.output = None
        branch.step += 1
        num_steps = run.position.num_steps
        if branch.step == num_steps:
            # The other branch of this step is still to come; guidance may have ended before the run did.
            run.branches = {
                key: each for key, each in run.branches.items() if each is not branch and each.step == num_steps - 1
            }
            if not run.branches:
                run.solver = None

    def disable_forecasts(self, reason: str) -> None:
        """Run full steps for the rest of the present run."""
        if self._run is not None:
            self._run.disable_forecasts(reason)

    def _place(
        self, context: Any, latents: Any, layout: Layout, foreign_cache: bool
    ) -> tuple[RunState, BranchState | None]:
        """Return the run and the branch of a call, None for one that runs in full and is not captured."""
        position, step, number = self._tracker.place(context)
        run = self._run
        if run is None or run.position is not position:
            run = self._begin(position)
        if run.stats.refused is not None:
            return run, None
        branch = run.branches.get((context.name, number))
        reason = find_incompatibility(position, context, step, number, foreign_cache)
        if reason is None and branch is not None:
            if step != branch.step:
                reason = f"step {step} came where step {branch.step} was due"
            elif layout != branch.layout:
                reason = f"the latents changed from {branch.layout} to {layout}"
        if reason is not None:
            run.disable_forecasts(reason)
            return run, None
        if branch is None:
            branch = self._begin_branch(run, context.name, number, step, latents, layout)
            if branch is not None:
                run.branches[context.name, number] = branch
        return run, branch

    def _begin(self, position: StepPosition) -> RunState:
        """Begin a run, and release what a run that was broken off kept."""
        solver, refused = None, None
        for sibling in self.siblings:
            if sibling._run is not None:
                if sibling._run.position.source is position.source:
                    # The history of velocities reaches from one model to the other.
                    solver = sibling._run.solver
                    refused = sibling._run.stats.refused if self._has_solver else None
                sibling._run.release()
            if sibling._run is None or sibling._run.position.source is not position.source:
                sibling.stats = None
        self.stats = RunStats(max(position.num_steps, 0), self._blocks)
        self.stats.refused = refused
        self._run = RunState(position, self.stats, solver=solver)
        return self._run

    def _begin_branch(
        self, run: RunState, context: str, number: int, step: int, latents: Any, layout: Layout
    ) -> BranchState | None:
        """Plan a branch from its first step on; None where there is no predictor or no plan for it."""
        sigmas, called = run.position.sigmas, call_name(context, number)
        if run.solver is not None:
            shared = run.solver.session
            return BranchState(called, shared, frozenset(shared.plan.full_steps), layout, step, solver=run.solver)
        names = self._find_predictors(context, called, latents)
        if not names:
            known = sorted(self._predictors)
            if context:
                run.warn(f"full steps for the cache context {context!r}: there are predictors for {known} alone")
            else:
                run.warn(
                    f"full steps: the pipeline opens no cache context that says which of the predictors {known} is "
                    "due, and its latents are not two equal halves"
                )
            return None
        predictor = self._predictors[names[0]]
        solver = predictor if isinstance(predictor, SolverPredictor) else None
        if solver is not None:
            if (reason := scheduler_incompatibility(self._tracker.scheduler)) is not None:
                run.disable_forecasts(reason)
                return None
            if step != solver.first_step:
                run.warn(
                    f"the run starts at step {step}, the learned solver was fitted for a start at step "
                    f"{solver.first_step}: {default_predictor()} forecasts the model's output instead"
                )
                names, predictor, solver = (_FALLBACK,), default_predictor(), None
        try:
            plans = [self._plan(name, sigmas, step) for name in names]
            reason = predictor.incompatibility(sigmas)
            session = self._session(plans)
        # Users bring their own predictors and rules, and no fault of theirs should cost an image.
        except Exception as error:
            run.disable_forecasts(str(error) if isinstance(error, ValueError) else repr(error))
            return None
        if reason is not None:
            run.warn(f"{reason}; it is used all the same, as on_other_sigmas says")
        run.stats.plan = run.stats.plan or str(plans[0])
        if solver is not None:
            run.solver = SolverRun(solver, plans[0])
            session = run.solver.session
        return BranchState(called, session, frozenset(plans[0].full_steps), layout, step, solver=run.solver)

    def _session(self, plans: Sequence[Plan]) -> Session | HalvesSession:
        """Return the history of one branch, or of both that a call holds."""
        dtype = self._options.history_dtype
        return Session(plans[0], history_dtype=dtype) if len(plans) == 1 else HalvesSession(plans, dtype)

    def _find_predictors(self, context: str, called: str, latents: Any) -> tuple[str, ...]:
        """Return the name under which a call finds its predictor, or those of the halves of its batch; none if none."""
        if self._is_shared:
            return (_SHARED,)
        if context:
            return next(((name,) for name in (called, context) if name in self._predictors), ())
        # A pipeline that opens no context has an unnamed one, whose calls have numbers, and may hold both branches.
        if all(name.partition(" ")[0] == ONLY_BRANCH for name in self._predictors):
            return (called if called in self._predictors else ONLY_BRANCH,)
        return HALVES if set(self._predictors) == set(HALVES) and are_equal_halves(latents) else ()


def _reason(act: Callable[..., str | None], *arguments: Any) -> str | None:
    """Let a learned solver act, and return why it cannot; a failure ends the forecasts, not the run."""
    try:
        return act(*arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"the learned solver failed: {error}"

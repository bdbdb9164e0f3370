"""Decides for each call of a model which run and branch it is of, and whether it is forecast; plans the branches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lesa_kernels.checks import check_decreasing, check_float
from lesa_kernels.integrations.branches import Branch, Run, warn
from lesa_kernels.integrations.model_calls import Conditions, ForwardCall, LoraState
from lesa_kernels.integrations.models import find_other_cache
from lesa_kernels.integrations.outputs import are_equal_halves, layout_of, uncompiled
from lesa_kernels.integrations.solver_run import SolverRun
from lesa_kernels.integrations.stats import RunStats
from lesa_kernels.integrations.steps import (
    StepPosition,
    StepTracker,
    call_name,
    find_disagreement,
    find_incompatibility,
)
from lesa_kernels.plan import Plan, check_count
from lesa_kernels.predictors import Predictor, SolverPredictor, TaylorSeer
from lesa_kernels.predictors.base import OnOtherSigmas
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.session import HalvesSession, Session, check_history
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


class _NotOurs(Exception):
    """A call is none of the run's: why, and what it is told of the noise level, None where that was not read."""


class CacheState:
    """Follows the calls of one model and decides which are forecast, where nothing is unexpected without any wait.

    A branch that begins late (image-to-image, guidance that starts in the middle) is planned from its first step on.
    Plans are kept by sigmas: a predictor must not change while it is enabled. `steps` are the arguments of
    `StepTracker`; `blocks` is how many a full call runs.
    """

    def __init__(
        self,
        steps: Mapping[str, Any],
        predictors: Predictors,
        schedule: Schedule | ScheduleRule | None,
        options: Options,
        blocks: int,
    ) -> None:
        self._tracker = StepTracker(**steps)
        self._is_shared = isinstance(predictors, Predictor)
        self._predictors = {_SHARED: predictors} if isinstance(predictors, Predictor) else dict(predictors)
        self._has_solver = isinstance(predictors, SolverPredictor)
        self._options = options
        self._blocks = blocks
        self._lora = LoraState()
        self._run: Run | None = None
        self._present: tuple[Run | None, Branch | None] = (None, None)  # of the call that is being answered
        # Why the first call that was none of the run's was left alone; None where all were.
        self.left_alone: str | None = None
        # Whether the latest call was none of the run's, and what it was told.
        self._others_turn = False
        self._others_told: float | None = None
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
        """Drop the present run and its history; the next call begins a new one.

        Not where the latest call was none of the run's: then it is another run that ended.
        """
        if self._others_turn:
            return
        if self._run is not None:
            # The traceback of an error may keep the run itself alive.
            self._run.release()
        self._run = self._tracker.position = None
        self._present = None, None

    @uncompiled()
    def enter(self, context: Any, call: ForwardCall, module: nn.Module, thread: int) -> Branch | None:
        """Return the branch of a call, with its forecast where one is due; None where nothing is to be captured.

        Args:
            context: diffusers' `CacheContext`.
            call: of the model.
            module: the model.
            thread: that calls.
        """
        run, branch = self._present = self._place(context, call, module, thread)
        if run is None:
            return None
        device = layout_of(call.latents)[-1] if branch is None else branch.layout[-1]
        solver = None if branch is None else branch.solver
        if branch is not None and solver is not None:
            reason = _reason(solver.arrive, branch.step, call.latents)
            if reason is not None:
                run.disable_forecasts(reason)
                branch = None
            elif (ring := solver.session.ring) is not None and not run.stats.history_bytes:
                run.stats.add_ring(ring)
        if branch is not None and branch.session is not None and branch.step not in branch.full_steps:
            run.stats.forecast.start(device)
            try:
                if branch.solver is None:
                    feature = branch.session.forecast(branch.step)
                    # What comes after may write to it.
                    branch.feature = feature.clone() if branch.step in branch.shared_steps else feature
                else:
                    branch.output = branch.solver.answer(branch.step)
                return branch
            except RuntimeError as error:
                run.disable_forecasts(f"the feature of step {branch.step} could not be forecast: {error}")
                branch = None
        run.stats.full.start(device)
        return None if branch is None or branch.session is None else branch

    @uncompiled()
    def capture_output(self, branch: Branch, latents: Any, output: Any) -> None:
        """Keep the output of a full step for a learned solver; see `capture`."""
        run, solver = self._run, branch.solver
        if run is None or solver is None or run.stats.refused is not None:
            return
        reason = _reason(solver.capture, branch.step, branch.name, latents, output)
        if reason is not None:
            run.disable_forecasts(reason)

    @uncompiled()
    def capture(self, branch: Branch, feature: Tensor) -> None:
        """Keep the feature of a full step; a failure ends the forecasts, not the run."""
        run, session, step = self._run, branch.session, branch.step
        if run is None or session is None:
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
    def leave(self) -> None:
        """Close the call that `enter` placed: count it, and release the history after the last step."""
        run, branch = self._present
        self._present = None, None
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
            run.branches = [each for each in run.branches if each is not branch and each.step == num_steps - 1]
            if not run.branches:
                run.solver = None

    def disable_forecasts(self, reason: str) -> None:
        """Run full steps for the rest of the present run."""
        if self._run is not None:
            self._run.disable_forecasts(reason)

    def _place(
        self, context: Any, call: ForwardCall, module: nn.Module, thread: int
    ) -> tuple[Run | None, Branch | None]:
        """Return the run and the branch of a call.

        No branch where it runs in full and is not captured, and no run where it is none of the run's calls.
        """
        conditions = self._conditions(call, module)
        try:
            position, step, number, branch = self._locate(context, call, module, thread, conditions)
        except _NotOurs as other:
            self._leave_alone(*other.args)
            return None, None
        run = self._run_at(position) or self._begin(position, thread)
        if run.stats.refused is not None:
            return run, None
        reason = find_incompatibility(position, step, number, find_other_cache(module, self._tracker.pipeline))
        if reason is not None:
            run.disable_forecasts(reason)
            return run, None
        if branch is None:
            name, layout = call_name(context.name, number), layout_of(call.latents)
            branch = Branch(context.name, name, layout, Conditions(conditions), step, step)
            run.stats.unwatched.update(
                name for name, only in call.parameters.watched.items() if only and conditions.get(name)
            )
            run.explain(branch, conditions)
            if run.stats.refused is None and self._begin_branch(run, branch, call.latents):
                run.branches.append(branch)
        if run.step != step:
            # Histories have no gaps: a branch that was left out in a step begins anew.
            run.step, run.branches = step, [each for each in run.branches if each.step >= step]
        return run, branch if run.stats.refused is None else None

    def _locate(
        self, context: Any, call: ForwardCall, module: nn.Module, thread: int, conditions: dict[str, Any]
    ) -> tuple[StepPosition, int, int, Branch | None]:
        """Return a call's run, step, number within the step, and branch; raises `_NotOurs`."""
        position, step = self._tracker.look(context)
        run, branch, timestep = self._run_at(position), None, None
        for name in () if run is None else run.unwatched:
            conditions.pop(name, None)
        caller = self._tracker.caller(module)
        if caller is not None and not self._tracker.owns(caller):
            raise _NotOurs(f"a {type(caller).__name__} makes it that has a scheduler of its own")
        if step is not None and (reason := find_disagreement(position, context, step)) is not None:
            raise _NotOurs(reason)
        is_strange = run is not None and run.thread != thread and caller is None
        if is_strange and step is not None:
            raise _NotOurs(f"it comes from another thread than the run at step {position.step}")
        # A call that comes after others must be told from theirs: by its very tensors, and its noise level.
        is_doubtful = self._others_turn and caller is None and step is not None
        layout = layout_of(call.latents)
        if run is not None:
            due = (position.step, position.step + 1) if step is None else (step,)
            branch = run.find_branch(context.name, due, layout, conditions, only_same_objects=is_doubtful)
        if position.told and (branch is None or is_strange or is_doubtful or _tells_host(call, branch, step)):
            timestep = call.largest_timestep()
        if run is not None and is_doubtful and (branch is None or position.follows(timestep, self._others_told)):
            raise _NotOurs("it goes on with others that are not", timestep)
        if timestep is not None:
            waits = None if branch is None else branch.step
            found = self._tracker.find(
                position, context, step, waits, timestep, caller is not None, call.is_told_exactly
            )
            if found is None:
                at = position.step if step is None else step
                own = "are the sigmas its own" if self._tracker.has_given_sigmas else "does it call scheduler.step"
                raise _NotOurs(
                    f"it is told {timestep:.4g}, which is not the noise level of step {at}: is it another loop's? "
                    f"If not, {own}?",
                    timestep,
                )
            if run is not None and branch is not None and found == (position, branch.step - 1):
                self._refuse_repeated(run, found[1])
            if found[0] is not position or (branch is not None and branch.step != found[1]):
                run = self._run_at(found[0])
                branch = None if run is None else run.find_branch(context.name, found[1:], layout, conditions)
            position, step = found
        elif step is None:
            position, step = self._count(position, context.name, branch)
        if is_strange and self._run_at(position) is not None:
            raise _NotOurs(f"it comes from another thread than the run at step {position.step}")
        self._others_turn = False
        return position, step, self._tracker.accept(position, step, context.name, timestep), branch

    def _refuse_repeated(self, run: Run, step: int) -> None:
        """End the forecasts where a call has the conditions and the step of the one before, if sigmas were given."""
        if self._tracker.has_given_sigmas:
            run.disable_forecasts(
                f"two calls at step {step} have the same conditions, and nothing says whether the loop began again: "
                "give scheduler= or cache_context(name, step_index=step)"
            )

    def _run_at(self, position: StepPosition) -> Run | None:
        """Return the present run, None if a position is that of another."""
        return self._run if self._run is not None and self._run.position is position else None

    def _conditions(self, call: ForwardCall, module: nn.Module) -> dict[str, Any]:
        """Return what a call is conditioned on."""
        conditions = call.conditions()
        pipeline = self._tracker.pipeline
        # A learned solver sees the guidance in the latents.
        if pipeline is not None and not self._has_solver:
            conditions["guidance_scale of the pipeline"] = vars(pipeline).get("_guidance_scale")
        if "peft_config" in vars(module):
            conditions["LoRA"] = self._lora.read(module)
        return conditions

    def _count(self, position: StepPosition, context: str, branch: Branch | None) -> tuple[StepPosition, int]:
        """Return the run and the step of a call where nothing but the calls themselves says it."""
        run = self._run_at(position)
        if run is None:
            return position, position.step
        if branch is not None:
            return position, branch.step
        step = position.step
        if run.stats.refused is not None:
            step = position.calls.get(context, position.step)
        elif not run.branches:
            step = position.num_steps
        elif context:
            step = max((each.step for each in run.branches if each.context == context), default=position.step)
        else:
            run.disable_forecasts(
                "a call has other arguments than the one before, and nothing says whether it is of the same step: give "
                "scheduler= or cache_context(name, step_index=step), or say with Adapter(timestep=...) which argument "
                "tells the noise level"
            )
        if step < position.num_steps or not self._tracker.has_given_sigmas:
            return position, step
        position = self._tracker.begin_again()
        return position, position.step

    def _leave_alone(self, reason: str, timestep: float | None = None) -> None:
        """Let a call that is none of the run's run in full, and say so of the first; `timestep` is what it is told."""
        self._others_turn, self._others_told = True, timestep
        if self.left_alone is None:
            self.left_alone = reason
            warn(f"a call runs in full that is none of the enabled run's: {reason}")

    def _begin(self, position: StepPosition, thread: int) -> Run:
        """Begin a run, and release what a run that was broken off kept."""
        solver, refused, before = None, None, self._run
        for sibling in self.siblings:
            if sibling._run is not None:
                if sibling._run.position.source is position.source:
                    # The history of velocities reaches from one model to the other.
                    solver = sibling._run.solver
                    refused = sibling._run.stats.refused if self._has_solver else None
                sibling._run.release()
            if sibling._run is None or sibling._run.position.source is not position.source:
                sibling.stats = None
        self.left_alone = None
        if before is not None and _is_rewritten(before.position, position):
            before.stats.restarts.append((position.step, "the scheduler's noise levels were written to"))
            self._run = Run(position, before.stats, thread)
            before.release()
            return self._run
        self.stats = RunStats(max(position.num_steps, 0), self._blocks)
        self.stats.refused = refused
        self._run = Run(position, self.stats, thread, solver=solver)
        return self._run

    def _begin_branch(self, run: Run, branch: Branch, latents: Any) -> bool:
        """Plan a branch from its first step on; return whether the run goes on with forecasts."""
        context, called, step, sigmas = branch.context, branch.name, branch.step, run.position.sigmas
        if run.solver is not None:
            branch.solver, branch.session = run.solver, run.solver.session
            branch.full_steps = frozenset(run.solver.session.plan.full_steps)
            return True
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
            return True
        predictor = self._predictors[names[0]]
        solver = predictor if isinstance(predictor, SolverPredictor) else None
        if solver is not None:
            if (reason := self._tracker.solver_incompatibility()) is not None:
                run.disable_forecasts(reason)
                return False
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
            return False
        if reason is not None:
            run.warn(f"{reason}; it is used all the same, as on_other_sigmas says")
        run.stats.plan = run.stats.plan or str(plans[0])
        if solver is not None:
            run.solver = branch.solver = SolverRun(solver, plans[0])
            session = run.solver.session
        branch.session, branch.full_steps = session, frozenset(plans[0].full_steps)
        if isinstance(session, Session):
            branch.shared_steps = plans[0].shared_steps
        return True

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


def _tells_host(call: ForwardCall, branch: Branch, step: int | None) -> bool:
    """Whether a call's noise level is looked at though nothing is unexpected.

    That is so where it costs no wait for a device, and on the full steps of loops whose calls are only counted.
    """
    told = call.told
    return not isinstance(told, Tensor) or told.is_cpu or (step is None and branch.step in branch.full_steps)


def _is_rewritten(before: StepPosition, now: StepPosition) -> bool:
    """Whether a run goes on with other noise levels, written where those before lay."""
    is_same = now.source is before.source and now.version != before.version
    return is_same and now.step > 0 and now.step >= before.step


def _reason(act: Callable[..., str | None], *arguments: Any) -> str | None:
    """Let a learned solver act, and return why it cannot; a failure ends the forecasts, not the run."""
    try:
        return act(*arguments)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"the learned solver failed: {error}"

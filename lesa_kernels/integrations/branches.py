"""Keeps what a sampling run is made of: its branches, each with a history, and what is to be said of it.

A run is one pass through a schedule. A branch is one stream of calls within it, one a step, that have the same
conditions: cache context ("cond", "uncond", ...), shape of the latents, prompt, and all else that the model gets. Only
its own history serves it, from the step on in which it began. A call that no branch waits for begins one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lesa_kernels.integrations.model_calls import Conditions
from lesa_kernels.integrations.outputs import Layout
from lesa_kernels.integrations.solver_run import SolverRun
from lesa_kernels.integrations.stats import RunStats
from lesa_kernels.integrations.steps import StepPosition
from lesa_kernels.session import HalvesSession, Session


class LesaWarning(UserWarning):
    """Something that a user should know of a run; most often that its rest is sampled without forecasts, and why."""


def warn(text: str) -> None:
    """Warn of something in a run."""
    warnings.warn(f"lesa: {text}", LesaWarning, stacklevel=2)


@dataclass
class Branch:
    """The history of one branch; with a learned solver all branches share one."""

    context: str
    name: str  # of its calls
    layout: Layout  # of the latents
    conditions: Conditions
    first_step: int
    step: int  # of the present call, and after it the step that is due
    session: Session | HalvesSession | None = None  # None where there is no predictor: all of its steps are full
    full_steps: frozenset[int] = frozenset()
    # Forecast steps whose slot of the history is read again.
    shared_steps: frozenset[int] = frozenset()
    # The conditions that were others at the step before, if it began because of them.
    changed: frozenset[str] = frozenset()
    feature: Tensor | None = None  # the forecast of the present step, a view of the history; None on a full step
    solver: SolverRun | None = None
    output: Any = None  # the solver's answer in the present step; None on a full step


@dataclass
class Run:
    """One pass through a schedule."""

    position: StepPosition
    stats: RunStats
    thread: int
    first_step: int = field(init=False)
    step: int = field(init=False)
    branches: list[Branch] = field(default_factory=list)
    solver: SolverRun | None = None
    warned: set[str] = field(default_factory=set)
    # Conditions that are others in each step.
    unwatched: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.first_step = self.step = self.position.step

    def warn(self, text: str) -> None:
        """Warn of something once a run."""
        if text not in self.warned:
            self.warned.add(text)
            warn(text)

    def find_branch(
        self,
        context: str,
        due: Sequence[int],
        layout: Layout,
        conditions: dict[str, Any],
        only_same_objects: bool = False,
    ) -> Branch | None:
        """Return the branch that waits for a call at one of some steps, the first first; None if none does.

        Args:
            context: name of its cache context.
            due: the steps.
            layout: of its latents.
            conditions: see `ForwardCall.conditions`.
            only_same_objects: whether its conditions must be the very objects that the branch had.
        """
        for step in due:
            waiting = [
                each for each in self.branches if (each.step, each.context, each.layout) == (step, context, layout)
            ]
            for branch in waiting:
                if branch.conditions.are_same_objects(conditions):
                    return branch
            for branch in () if only_same_objects else waiting:
                # Which of several branches a call is of, its values say.
                is_forecast = len(waiting) == 1 and step not in branch.full_steps
                if self._is_alike(branch, conditions, is_forecast):
                    return branch
        return None

    def explain(self, branch: Branch, conditions: dict[str, Any]) -> None:
        """Note why a branch begins in the middle of the run; for a learned solver that ends the forecasts."""
        due = [each for each in self.branches if each.context == branch.context]
        waiting = [each for each in due if each.step == branch.step]
        alike = {
            each.conditions.differences(conditions, self.unwatched, False): each
            for each in waiting
            if each.layout == branch.layout
        }
        late = [each for each in due if each.step < branch.step]
        if alike:
            changed = min(alike, key=len)
            # From the first step of the run on, it may be another one in each.
            if alike[changed].first_step == self.first_step and branch.step == self.first_step + 1:
                branch.changed = changed
            reason = f"{', '.join(sorted(changed))} changed"
        elif waiting:
            reason = f"the latents changed from {waiting[0].layout} to {branch.layout}"
        elif late:
            reason = f"step {branch.step} came where step {late[0].step} was due"
        elif branch.step > self.first_step:
            reason = f"a call joined: {branch.name}"
        else:
            return
        if self.solver is not None:
            self.disable_forecasts(reason)
        self.stats.restarts.append((branch.step, reason))

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

    def _is_alike(self, branch: Branch, conditions: dict[str, Any], is_forecast: bool) -> bool:
        """Whether a call's conditions are those of a branch but for what is another one in each step."""
        changed = branch.conditions.differences(conditions, self.unwatched, is_forecast)
        if changed and changed <= branch.changed and branch.step == branch.first_step + 1:
            # Changed at each call since the first: that is how the loop makes them.
            self.unwatched |= changed
            self.stats.unwatched |= changed
            changed = frozenset()
        if changed:
            return False
        watched = {name: value for name, value in conditions.items() if name not in self.unwatched}
        branch.conditions.adopt(watched, is_forecast)
        return True

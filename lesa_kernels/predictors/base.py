"""Defines the base class of predictors, which make rows of coefficients; kernels and sessions see only these."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, TypeAlias

from lesa_kernels.checks import check_decreasing
from lesa_kernels.plan import Plan, RowRule, compile_plan
from lesa_kernels.schedule import Schedule, ScheduleRule

OnOtherSigmas: TypeAlias = Literal["refuse", "adapt"]

# Sigmas pass through float32, and versions of a scheduler round them differently.
_SIGMA_TOLERANCE = 1e-4


def sigmas_incompatibility(trained: Sequence[float] | None, sigmas: Sequence[float]) -> str | None:
    """Say where noise levels differ from those of a training; None where they do not, or are not as many."""
    if trained is None or len(trained) != len(sigmas):
        return None
    gaps = [abs(float(new) - old) for new, old in zip(sigmas, trained, strict=True)]
    step = max(range(len(gaps)), key=gaps.__getitem__)
    if gaps[step] <= _SIGMA_TOLERANCE:
        return None
    return (
        f"the predictor was trained for other sigmas: {trained[step]:.4f} at step {step} of {len(trained) - 1}, "
        f"not {float(sigmas[step]):.4f}"
    )


class Predictor(ABC):
    """Base of all predictors. A new one implements `rows` and needs to touch no kernel."""

    @abstractmethod
    def rows(self, sigmas: Sequence[float]) -> RowRule:
        """Bind the predictor to a schedule's noise levels.

        Args:
            sigmas: S+1 falling noise levels.

        Returns:
            A function (step, full steps before it) -> the `Row` of that step, or None where the history is too short:
            the plan then makes the step full.
        """

    def incompatibility(self, sigmas: Sequence[float]) -> str | None:
        """Say why the predictor was not made for these sigmas; None if it was, or if any will do.

        Args:
            sigmas: S+1 falling noise levels.

        Returns:
            A clause for a message, or None.
        """
        return None

    @property
    def schedule(self) -> Schedule | None:
        """The full steps that the predictor was trained or fitted for, None if it was not made for any."""
        return None

    def plan(
        self,
        sigmas: Sequence[float],
        schedule: Schedule | ScheduleRule | None = None,
        *,
        first_step: int = 0,
        chunk: int | None = None,
        check_every: int | None = None,
        on_other_sigmas: OnOtherSigmas = "refuse",
    ) -> Plan:
        """Compile this predictor for a schedule.

        Args:
            sigmas: S+1 falling noise levels, such as a diffusers scheduler's `sigmas`; a list or a 1-d tensor.
            schedule: which steps are full, or a rule that makes the schedule from the sigmas; None takes the one that
                the predictor was made for.
            first_step: where the run starts (image-to-image starts late).
            chunk: at most this many forecasts a launch (1: step by step); None composes whole segments.
            check_every: of the full steps after the first, compare each n-th with what it would have been forecast; see
                `Session.errors`. None compares none.
            on_other_sigmas: what to do with sigmas that the predictor was not trained for: "refuse", or "adapt", which
                uses it as it is.

        Returns:
            The plan. Its `full_steps` may hold more steps than the schedule's: those with too short a history.

        Raises:
            ValueError: when the sigmas do not fall, the schedule does not fit them or is missing, a number is out of
                range, or the predictor was trained for other sigmas.
            TypeError: when the schedule is neither a Schedule nor a rule.
        """
        if on_other_sigmas not in ("refuse", "adapt"):
            raise ValueError(f'on_other_sigmas must be "refuse" or "adapt", got {on_other_sigmas!r}')
        levels = check_decreasing(sigmas)
        chosen = self.schedule if schedule is None else schedule
        if chosen is None:
            raise ValueError(f"schedule must be given: this {type(self).__name__} was not made for one")
        if on_other_sigmas == "refuse" and (reason := self.incompatibility(levels)) is not None:
            raise ValueError(f'{reason}; on_other_sigmas="adapt" uses it all the same')
        return compile_plan(
            levels, chosen, self.rows(levels), first_step=first_step, chunk=chunk, check_every=check_every
        )

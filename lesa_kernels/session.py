"""Runs a plan: full steps push their feature (or their quantities), the others take their forecast from the ring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor

from lesa_kernels.checks import check_type
from lesa_kernels.ops.contract import FEATURE_DTYPES, check_dense, check_feature
from lesa_kernels.ops.numerics import arithmetic_dtype
from lesa_kernels.plan import Check, Launch, Plan, Segment, Term
from lesa_kernels.ring import Ring


class Session:
    """Runs a plan. A cached step reads no tensor value, allocates nothing and waits for nothing.

    The ring is allocated by the first push, on the device of the feature, and kept from run to run. A push of the
    plan's first step starts a new run, whatever became of the one before.

    Args:
        plan: what to run.
        history_dtype: dtype of the ring; None takes that of the features.

    Raises:
        TypeError: when history_dtype is no dtype for a history.
    """

    def __init__(self, plan: Plan, *, history_dtype: torch.dtype | None = None) -> None:
        check_type("plan", plan, Plan, "a Plan")
        check_history(history_dtype)
        self.plan = plan
        self._history_dtype = history_dtype
        self._feature_dtype = torch.float32
        self._ring: Ring | None = None
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}
        self._segments: dict[int, Segment] = {segment.full_step: segment for segment in plan.segments}
        self._previous = {
            full: plan.segments[position - 1].full_step if position else None
            for position, full in enumerate(plan.full_steps)
        }
        self._launches = {
            step: (segment, launch, row)
            for segment in plan.segments
            for launch in segment.launches
            for step, row in zip(launch.steps, launch.output, strict=True)
        }
        self._checks: dict[int, tuple[Tensor, Tensor]] = {}
        self._errors: dict[int, Tensor] = {}
        self._full_step: int | None = None
        self._pushed: set[Term] = set()
        self._launched: Launch | None = None

    @property
    def ring(self) -> Ring | None:
        """The ring, None before the first push."""
        return self._ring

    @property
    def errors(self) -> dict[int, Tensor]:
        """How far the checked steps of this run were from what they would have been forecast.

        Of a plan that was made with `check_every`: full step -> mean |forecast - feature| / mean |feature|, [] in
        float32 (float64 for float64 features). To read one is to wait for the device.
        """
        return dict(self._errors)

    def reset(self) -> None:
        """Forget the run; the ring's memory is kept."""
        self._errors.clear()
        self._full_step = None
        self._pushed.clear()
        self._launched = None

    def push(self, step: int, feature: Tensor, quantity: str | None = None) -> None:
        """Hand in the feature of a full step, or one of its quantities; it is copied.

        Args:
            step: a full step of the plan, the one after the last that was pushed, or the first one (a new run).
            feature: [*feature], any strides. A new run may bring another shape, dtype or device.
            quantity: which of `plan.quantities` it is, in any order; None for a plan that has none. What the step does
                not need is left aside.

        Raises:
            ValueError: when the step is not full, or the feature's shape or device changes within a run.
            TypeError: when the feature is of no feature dtype or not dense.
            RuntimeError: when the step is out of order.
        """
        check_type("feature", feature, Tensor, "a tensor")
        check_dense("push", "feature", feature)
        check_feature("push", "feature", feature)
        check_type("step", step, SupportsIndex, "an integer")
        segment = self._segments.get(step)
        if segment is None:
            raise ValueError(f"step must be a full step of the plan {self.plan.full_steps}, got {step}")
        if quantity not in (self.plan.quantities or (None,)):
            wanted = f"one of {sorted(self.plan.quantities)}" if self.plan.quantities else "None"
            raise ValueError(f"quantity must be {wanted}, as the plan reads them, got {quantity!r}")
        term: Term = step if quantity is None else (step, quantity)
        # A step may hand in several quantities; any of them begins it.
        begins = step != self._full_step or self._launched is not None or term in self._pushed
        starts = begins and step == self.plan.first_step
        if starts:
            self.reset()
        elif begins and self._previous[step] != self._full_step:
            raise RuntimeError(
                f"step {step} must follow a push of step {self._previous[step]}, the last was {self._full_step}"
            )
        elif begins and (unfinished := self._unfinished()) is not None:
            raise RuntimeError(f"step {step} must follow the forecast of step {unfinished}, which was left out")
        ring = self._ring_for(feature, starts)
        slot = segment.slots.get(term)
        if slot is not None:
            ring.push(feature, slot)
            if segment.check is not None:
                self._errors[step] = ring.error(*self._checks[step], segment.check.read, slot)
        if begins:
            self._pushed.clear()
        self._pushed.add(term)
        self._feature_dtype = feature.dtype
        self._full_step = step
        self._launched = None

    def forecast(self, step: int) -> Tensor:
        """Return the feature of a forecast step.

        The first call after a full step computes the whole segment (or the next chunk of it).

        Args:
            step: a forecast step of the segment whose full step was pushed last.

        Returns:
            [*feature], of the features' dtype. A view of the ring's memory where that has it too: valid until the next
            push (with a chunked plan: until the next call), so copy it before writing to it.

        Raises:
            ValueError: when the step is not a forecast step of the plan.
            RuntimeError: when the step is out of order.
        """
        if type(step) is not int:
            # A check against a protocol takes longer than the rest of a cached step.
            check_type("step", step, SupportsIndex, "an integer")
        if step not in self._launches:
            raise ValueError(
                f"step must be a forecast step of the plan (full steps: {self.plan.full_steps}), got {step}"
            )
        segment, launch, row = self._launches[step]
        if segment.full_step != self._full_step or self._ring is None:
            raise RuntimeError(
                f"step {step} must follow a push of step {segment.full_step}, the last was {self._full_step}"
            )
        if launch is not self._launched:
            done = -1 if self._launched is None else segment.launches.index(self._launched)
            if segment.launches.index(launch) != done + 1:
                raise RuntimeError(f"step {launch.steps[0]} must come in its turn: chunks run once, in order")
            if missing := [term for term in segment.slots if term not in self._pushed]:
                raise RuntimeError(f"step {step} must follow a push of {missing[0]}, which was left out")
            self._ring.forecast(*self._rows[launch.steps[0]], launch.read, launch.write)
            self._launched = launch
        return self._ring[launch.write[row]].to(self._feature_dtype)

    def _unfinished(self) -> int | None:
        """Return the first step of the current segment whose launch did not run."""
        if self._full_step is None:
            return None
        launches = self._segments[self._full_step].launches
        done = 0 if self._launched is None else launches.index(self._launched) + 1
        return launches[done].steps[0] if done < len(launches) else None

    def _ring_for(self, feature: Tensor, starts: bool) -> Ring:
        """Return the ring for a feature: the present one if it fits, a new one only where a run starts."""
        dtype = self._history_dtype or feature.dtype
        ring = self._ring
        if ring is not None and (ring.shape, ring.dtype, ring.device) == (tuple(feature.shape), dtype, feature.device):
            return ring
        if ring is not None and not starts:
            raise ValueError(
                f"feature must stay of shape {ring.shape}, dtype {ring.dtype} on {ring.device} within a run, "
                f"got {tuple(feature.shape)}, {dtype} on {feature.device}"
            )
        self._ring = None
        self._ring = Ring(self.plan.num_slots, feature.shape, dtype, feature.device)
        self._rows = {
            launch.steps[0]: _row_tensors(launch, dtype, feature.device)
            for segment in self.plan.segments
            for launch in segment.launches
        }
        self._checks = {
            segment.full_step: _check_tensors(segment.check, dtype, feature.device)
            for segment in self.plan.segments
            if segment.check is not None
        }
        return self._ring


class HalvesSession:
    """A session of each half of a batch, used as one: two branches of guidance that one call of the model holds.

    Args:
        plans: of the first and of the second half.
        history_dtype: see `Session`.

    Raises:
        ValueError: when their full steps differ.
    """

    def __init__(self, plans: Sequence[Plan], history_dtype: torch.dtype | None) -> None:
        if len({plan.full_steps for plan in plans}) > 1:
            raise ValueError(
                "predictors of one call must have the same full steps, got "
                f"{' and '.join(str(plan.full_steps) for plan in plans)}"
            )
        self.plan = plans[0]
        self.sessions = tuple(Session(plan, history_dtype=history_dtype) for plan in plans)

    @property
    def errors(self) -> dict[int, Tensor]:
        """See `Session.errors`; the larger one of the halves."""
        first, second = (session.errors for session in self.sessions)
        return {step: torch.maximum(error, second[step]) for step, error in first.items()}

    def push(self, step: int, feature: Tensor) -> None:
        """See `Session.push`."""
        for session, half in zip(self.sessions, feature.chunk(2), strict=True):
            session.push(step, half)

    def forecast(self, step: int) -> Tensor:
        """See `Session.forecast`; a tensor of its own, as the halves lie in two rings."""
        return torch.cat([session.forecast(step) for session in self.sessions])


def check_history(dtype: torch.dtype | None) -> None:
    """Check the dtype of a history; see `Session` for what it raises."""
    if dtype is not None and dtype not in FEATURE_DTYPES:
        raise TypeError(f"history_dtype must be None or one of {FEATURE_DTYPES}, got {dtype}")


def _row_tensors(launch: Launch, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    kind = arithmetic_dtype(dtype)
    return (
        torch.tensor(launch.coefficients, dtype=kind, device=device).reshape(len(launch.write), len(launch.inputs)),
        torch.tensor(launch.offsets, dtype=kind, device=device),
    )


def _check_tensors(check: Check, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    kind = arithmetic_dtype(dtype)
    return (
        torch.tensor(check.coefficients, dtype=kind, device=device),
        torch.tensor([check.offset], dtype=kind, device=device),
    )

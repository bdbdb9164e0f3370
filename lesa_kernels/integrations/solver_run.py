"""Follows a run with a learned solver: its branches share one history, of velocities in place of features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.guidance import (
    agrees,
    coarsest,
    estimate_scale,
    is_doubled,
    own_latents,
    rounding_noise,
    seen_velocity,
)
from lesa_kernels.integrations.outputs import only_tensor, refilled
from lesa_kernels.plan import Plan
from lesa_kernels.predictors import SolverPredictor
from lesa_kernels.predictors.solver import COND, NOISE, UNCOND, VELOCITY
from lesa_kernels.session import Session

# Relative to the larger of 1 and the scale: other guidance than the calibrated one is further away.
_SAME_SCALE = 0.02
# Standard deviations of what rounding does to the scale that is seen.
_DEVIATIONS = 4.0


class SolverRun:
    """The state of one run with a learned solver, shared by the branches of guidance and by both models of Wan 2.2.

    A full step answers with the model's own output. When the next step comes, its latents show the velocity that the
    scheduler got: it must be that of the calibrated guidance. The host waits for the device there, once a full step.

    Args:
        predictor: the learned solver.
        plan: of it.

    Attributes:
        is_told: whether the first call was told another noise level than that of its latents.
    """

    def __init__(self, predictor: SolverPredictor, plan: Plan) -> None:
        self.is_told = False
        self.session = Session(plan, history_dtype=torch.float32)
        self._predictor = predictor
        self._sigmas = plan.sigmas
        self._full_steps = plan.full_steps
        self._output: Any = None  # the latest of the model: what answers are laid out like
        self._due: int | None = None  # the full step that waits for the next one
        self._latents: Tensor | None = None  # before that step, [B, ...] like a velocity
        self._velocities: dict[str, Tensor] = {}  # of its calls, float32
        self._dtype = torch.float32  # the coarsest of latents and outputs

    def arrive(self, step: int, latents: Any) -> str | None:
        """Close the last full step when a call of a later one comes.

        Args:
            step: of the call.
            latents: the model's first argument.

        Returns:
            Why this run cannot be forecast, None if it can.
        """
        due, before = self._due, self._latents
        if due is None or step == due:
            return None
        tensor = only_tensor(latents)
        if before is None or tensor is None or step != due + 1:
            return f"step {step} came after step {due}"
        branches = self._predictor.branches
        names = tuple(self._velocities)
        wanted = branches if branches and not self._predictor.is_batched else names[:1]
        if set(names) != set(wanted):
            return f"step {due} made the calls {names}, the predictor was calibrated for {wanted or 'one call'}"
        velocities = list(self._velocities.values())
        if self._predictor.is_batched:
            uncond, cond = velocities[0].chunk(2)
        elif branches:
            uncond, cond = (self._velocities[name] for name in branches)
        else:
            uncond = cond = velocities[0]
        guidance = self._predictor.guidance[self._full_steps.index(due)] if branches else None
        velocity = cond if guidance is None else guidance.combine(uncond, cond)
        after = own_latents(tensor, velocities[0], self._predictor.is_batched)
        if not branches and is_doubled(after) and not is_doubled(velocity):
            return f"step {due} was guided in one call, the predictor was calibrated without guidance"
        reason = self._difference(due, before, after, uncond, cond, velocity)
        if reason is not None:
            return reason
        quantities = {VELOCITY: velocity, UNCOND: uncond, COND: cond, NOISE: before}
        for quantity in self.session.plan.quantities:
            self.session.push(due, quantities[quantity], quantity)
        self._due = self._latents = None
        self._velocities.clear()
        return None

    def capture(self, step: int, name: str, latents: Any, output: Any) -> str | None:
        """Keep the output of a call in a full step.

        Args:
            step: of the call.
            name: of the call, see `ModelCall.branch`.
            latents: the model's first argument.
            output: of the model.

        Returns:
            Why this run cannot be forecast, None if it can.
        """
        before, made = only_tensor(latents), only_tensor(output)
        if before is None or made is None:
            return "a learned solver needs a model whose latents and output are one tensor each, or lists of like ones"
        try:
            own = own_latents(before, made, self._predictor.is_batched)
        except ValueError as error:
            return str(error)
        if name in self._velocities:
            return f"step {step} came with a second call of {name!r}"
        first = step == self.session.plan.first_step
        if self._predictor.is_batched and first and not is_doubled(before):
            return "the predictor was calibrated with guidance in one call, whose latents are two equal halves"
        self._output = output
        self._due = step
        self._dtype = coarsest(before, made)
        # Loops may write to both.
        self._latents = own.float().clone()
        self._velocities[name] = self._predictor.sign * made.detach().float()
        return None

    @property
    def caveat(self) -> str:
        """What a run is besides that ends here without a forecast; its first call may have been the solver's own."""
        if not self.is_told or self.session.ring is not None:
            return ""
        return (
            "; its first call was told another noise level, so this is not the image of an unaccelerated run: "
            "calibrate for such runs, or call lesa.disable(pipe)"
        )

    def timestep(self, step: int) -> float | None:
        """Return what the model is to be told of the noise level in a full step, None for what the pipeline says."""
        return self._predictor.first_timestep if step == self._predictor.first_step else None

    def answer(self, step: int) -> Any:
        """Return the model's output of a forecast step: the same in every branch, and a copy, as loops write to it."""
        made = only_tensor(self._output)
        velocity = self._predictor.sign * self.session.forecast(step)
        if made is None:
            raise RuntimeError(f"step {step} must follow a full step")
        both = torch.cat([velocity, velocity]) if self._predictor.is_batched else velocity.clone()
        return refilled(self._output, both.to(made.dtype))

    def _difference(
        self, step: int, before: Tensor, after: Tensor, uncond: Tensor, cond: Tensor, velocity: Tensor
    ) -> str | None:
        """Say how a full step went otherwise than in the calibration, None where it did not; waits for the device."""
        length = self._sigmas[step + 1] - self._sigmas[step]
        seen, moves = seen_velocity(before, after, length)
        noise = rounding_noise(after, velocity, self._dtype, abs(length))
        otherwise = (
            f"step {step} moved the latents otherwise than Euler's step with the calibrated guidance: another solver, "
            "another rule of guidance, new noise or a callback?"
        )
        if self._predictor.branches:
            guidance = self._predictor.guidance[self._full_steps.index(step)]
            scale = estimate_scale(uncond * moves, cond * moves, seen, guidance.rule)
            apart = float((cond - uncond).norm())
            rounding = _DEVIATIONS * noise / max(apart * seen.numel() ** 0.5, 1e-20)
            if abs(scale - guidance.scale) > _SAME_SCALE * max(1.0, abs(guidance.scale)) + rounding:
                other = replace(guidance, scale=scale).combine(uncond, cond)
                if agrees(other * moves, seen, noise):
                    return (
                        f"step {step} had guidance of scale {scale:.3g}, the predictor was calibrated with {guidance}"
                    )
                return otherwise
        return None if agrees(velocity * moves, seen, noise) else otherwise

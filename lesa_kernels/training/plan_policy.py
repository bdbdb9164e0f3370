"""Follows plans along a source's runs, so that what they give can be compared with unaccelerated runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lesa_kernels.plan import Plan
from lesa_kernels.session import Session
from lesa_kernels.training.references import Reference
from lesa_kernels.trajectories import ModelCall, check_single_model, watch


class PlanPolicy:
    """Answers calls by plans: with the blocks on full steps, with forecasts on the others.

    Args:
        plan: of the only branch, or of each by its name; all with the same full steps.
        reference: what the unaccelerated runs showed; None for a model that is called once a step.

    Attributes:
        final: latents of one branch at the end of the run, by Euler's last step; None before.
    """

    def __init__(self, plan: Plan | Mapping[str, Plan], reference: Reference | None = None) -> None:
        self.final: Tensor | None = None
        self._reference = reference or Reference({})
        names = self._reference.branches.names
        plans = dict.fromkeys(names, plan) if isinstance(plan, Plan) else plan
        if set(plans) != set(names):
            raise ValueError(f"predictors must be of the branches {sorted(names)}, got {sorted(plans)}")
        self._plan = plans[names[0]]
        if self._plan.quantities:
            raise ValueError("predictor must forecast features; SolverFits.psnr_db judges learned solvers")
        if any(each.full_steps != self._plan.full_steps for each in plans.values()):
            raise ValueError(
                "predictors must have the same full steps for all branches, got "
                f"{' and '.join(str(each.full_steps) for each in plans.values())}"
            )
        self._sessions = {name: Session(each) for name, each in plans.items()}
        self._outputs: dict[str, Tensor] = {}

    def __call__(self, call: ModelCall) -> Tensor | None:
        """Answer a call."""
        check_single_model(call)
        branches, sigmas = self._reference.branches, self._plan.sigmas
        if call.branch not in self._sessions and not branches.is_batched:
            raise ValueError(f"source must make the calls {sorted(self._sessions)} in each step, got {call.branch!r}")
        if self._plan.is_full(call.step):
            feature, output = watch(call)
            for name, part in branches.split(call.branch, feature).items():
                self._sessions[name].push(call.step, part)
        elif call.tail is None:
            output = None
        else:
            names = branches.names if branches.is_batched else (call.branch,)
            forecasts = [self._sessions[name].forecast(call.step) for name in names]
            output = call.tail(forecasts[0] if len(forecasts) == 1 else torch.cat(forecasts))
        if output is not None and call.latents is not None and call.step == len(sigmas) - 2:
            # A loop may write to what it gets.
            self._outputs |= {name: part.detach().clone() for name, part in branches.split(call.branch, output).items()}
            if set(self._outputs) == set(branches.names):
                length = sigmas[call.step + 1] - sigmas[call.step]
                velocity = self._reference.velocity(call.step, self._outputs)
                self.final = branches.own(call.latents, output).detach().float() + length * velocity.float()
        return output

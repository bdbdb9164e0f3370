"""Steps from each full step to the next with calibrated coefficients: a learned solver of the sampling equation.

Between two full steps nothing new is known, so a forecast can only choose where the latents are when the next full step
comes. That point is linear in very little: the velocities of the last full steps, of each branch of guidance, and the
noise that the run began with. Relatives: bespoke non-stationary solvers (arXiv 2403.01329), S4S (arXiv 2502.17423).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.checks import check_decreasing, check_float, check_int, check_list
from lesa_kernels.guidance import Guidance
from lesa_kernels.ops.contract import MAX_HISTORY
from lesa_kernels.plan import Plan, Row, RowRule, Term
from lesa_kernels.predictors.base import OnOtherSigmas, Predictor, sigmas_incompatibility
from lesa_kernels.predictors.saved import Saved
from lesa_kernels.schedule import Schedule, ScheduleRule

NOISE, VELOCITY, UNCOND, COND = "noise", "velocity", "uncond", "cond"
"""The quantities of a full step: the latents of the run's first call, the velocity that the scheduler gets, and the
velocities of the two branches of guidance."""


class SolverPredictor(
    Saved,
    Predictor,
    library_name="lesa-kernels",
    tags=["feature-caching", "diffusion"],
):
    """A learned solver: one velocity for all steps between two full ones, fitted by `lesa_kernels.training.fit_solver`.

    From the full step i to the next one e (or to S, the end) the latents go to

        x_e = x_i + (sigma_e - sigma_i) v + b x_T + sum_k (p_k u_k + q_k (c_k - u_k))

    where v is the velocity of step i as the scheduler gets it, u_k and c_k are those of the branches of guidance k full
    steps earlier (k = 0: step i), and x_T is the noise. Without guidance u_k = c_k = v_k, and there is no q. The full
    step answers as ever; the steps after it all answer with the velocity that leads from there to x_e.

    At the first noise level a model can say no more than the mean of all images. So the first call may be told a lower
    one, `first_timestep`: what it makes of the noise then points to where this run goes.

    It is made for one set of full steps, one set of sigmas, one guidance, and for Euler's steps of a flow: other runs
    are refused. (Guidance that the model takes as an argument is not seen.) `save_pretrained(folder)` writes
    safetensors and config.json, `from_pretrained` reads them.

    Args:
        sigmas: S+1 falling noise levels.
        full_steps: ascending; the first is where the run starts (0, or later for image-to-image).
        window: K, full steps whose velocities count, 1 to 31.
        branches: () without guidance, else the names of the calls of u and of c, such as ("uncond", "cond").
        is_batched: whether the branches are two halves of one call, u first.
        guidance: with branches: of each full step, as `Guidance` or its fields [scale, rule, rescale].
        sign: -1 where the pipeline takes the negative of what its model returns, else 1.
        first_timestep: what the model is told of the noise level in its first call, in the units of its own argument;
            None: that of its latents.

    Raises:
        ValueError: when the sigmas do not fall, the full steps are not ascending and below S, or a number is out of
            range; when there is guidance without branches, or not as many as full steps.
        TypeError: when an argument is of another type.
    """

    coefficients: Tensor

    def __init__(
        self,
        sigmas: Sequence[float],
        full_steps: Sequence[int],
        window: int = 3,
        branches: Sequence[str] = (),
        is_batched: bool = False,
        guidance: Sequence[Any] = (),
        sign: float = 1.0,
        first_timestep: float | None = None,
    ) -> None:
        super().__init__()
        self.trained_sigmas = check_decreasing(sigmas)
        steps = [
            check_int(f"full_steps[{position}]", step, 0, len(self.trained_sigmas) - 2)
            for position, step in enumerate(check_list("full_steps", full_steps, "steps"))
        ]
        if not steps or sorted(set(steps)) != steps:
            raise ValueError(f"full_steps must be ascending and not empty, got {steps}")
        self.full_steps = tuple(steps)
        # Both branches of each, the velocity and the noise are read by one launch.
        self.window = check_int("window", window, 1, MAX_HISTORY // 2 - 1)
        self.branches = tuple(check_list("branches", branches, "names of calls"))
        if len(self.branches) not in (0, 2) or not all(isinstance(name, str) for name in self.branches):
            raise ValueError(f"branches must be none or the names of two calls, got {self.branches}")
        self.is_batched = bool(is_batched)
        self.guidance = tuple(
            each if isinstance(each, Guidance) else Guidance(*check_list("guidance", each, "fields of a Guidance"))
            for each in check_list("guidance", guidance, "one Guidance a full step")
        )
        if len(self.guidance) != (len(steps) if self.branches else 0):
            raise ValueError(
                f"guidance must be of each of {len(steps)} full steps with branches and of none without, "
                f"got {len(self.guidance)} for the branches {self.branches}"
            )
        if sign not in (1, -1):
            raise ValueError(f"sign must be 1 or -1, got {sign!r}")
        self.sign = float(sign)
        self.first_timestep = None if first_timestep is None else check_float("first_timestep", first_timestep)
        columns = 1 + self.window * (2 if self.branches else 1)
        self.register_buffer("coefficients", torch.zeros(len(steps), columns, dtype=torch.float64))
        self._hub_mixin_config: dict[str, Any] = {
            "predictor": "SolverPredictor",
            "sigmas": list(self.trained_sigmas),
            "full_steps": steps,
            "window": self.window,
            "branches": list(self.branches),
            "is_batched": self.is_batched,
            "guidance": [list(astuple(each)) for each in self.guidance],
            "sign": self.sign,
            "first_timestep": self.first_timestep,
        }

    @property
    def schedule(self) -> Schedule:
        """The full steps that the coefficients were fitted for; step 0 is added where the run starts late."""
        return Schedule(len(self.trained_sigmas) - 1, tuple(dict.fromkeys((0, *self.full_steps))))

    @property
    def first_step(self) -> int:
        """Where its runs start."""
        return self.full_steps[0]

    def incompatibility(self, sigmas: Sequence[float]) -> str | None:
        """See `Predictor.incompatibility`."""
        return sigmas_incompatibility(self.trained_sigmas, sigmas)

    def terms(self, segment: int) -> list[tuple[int, str] | None]:
        """Return what each column of `coefficients` counts for, None where a run has not come so far.

        Args:
            segment: number of the full step that it begins with.

        Returns:
            x_T; then for each k the velocity of u_k (without branches: v_k); then for each k that of c_k.
        """
        of_k = [self.full_steps[segment - k] if k <= segment else None for k in range(self.window)]
        names = (UNCOND, COND) if self.branches else (VELOCITY,)
        return [
            (self.first_step, NOISE),
            *(None if step is None else (step, name) for name in names for step in of_k),
        ]

    def rows(self, sigmas: Sequence[float]) -> RowRule:
        """See `Predictor.rows`. The forecast of a step is the velocity that it answers with.

        Raises:
            ValueError: when there are not S+1 sigmas.
        """
        if len(sigmas) != len(self.trained_sigmas):
            raise ValueError(f"sigmas must hold {len(self.trained_sigmas)} values, got {len(sigmas)}")
        coefficients = self.coefficients.tolist()
        ends = (*self.full_steps[1:], len(sigmas) - 1)

        def row(step: int, full_steps: Sequence[int]) -> Row:
            segment = len(full_steps) - 1
            begin, end = self.full_steps[segment], ends[segment]
            left = sigmas[end] - sigmas[begin + 1]
            terms: dict[Term, float] = {(begin, VELOCITY): 1.0}
            for term, value in zip(self.terms(segment), coefficients[segment], strict=True):
                if term is None:
                    continue
                terms[term] = terms.get(term, 0.0) + value / left
                if term[1] == COND:
                    of_uncond = (term[0], UNCOND)
                    terms[of_uncond] = terms.get(of_uncond, 0.0) - value / left
            return Row(terms)

        return row

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
        """Compile it for a run; see `Predictor.plan`.

        Args:
            sigmas: S+1 noise levels, those of the fit.
            schedule: with the full steps of the fit; None takes them.
            first_step: where the run starts, as in the fit.
            chunk: at most this many steps a launch; None makes the one velocity of a segment once.
            check_every: None; no feature is forecast that could be compared.
            on_other_sigmas: see `Predictor.plan`.

        Returns:
            The plan. What full steps hand in are its `quantities`.

        Raises:
            ValueError: see `Predictor.plan`; also for full steps or a first step that it was not fitted for, and for
                `check_every`.
        """
        if check_every is not None:
            raise ValueError(
                f"check_every must be None for a learned solver, which forecasts no feature, got {check_every}"
            )
        if first_step != self.first_step:
            raise ValueError(f"first_step must be {self.first_step}, for which this was fitted, got {first_step}")
        levels = check_decreasing(sigmas)
        chosen = self.schedule if schedule is None else schedule if isinstance(schedule, Schedule) else schedule(levels)
        wanted = tuple(dict.fromkeys((first_step, *(step for step in chosen.full_steps if step > first_step))))
        if wanted != self.full_steps:
            raise ValueError(f"schedule must have the full steps {self.full_steps} of the fit, got {wanted}")
        return super().plan(levels, self.schedule, first_step=first_step, chunk=chunk, on_other_sigmas=on_other_sigmas)

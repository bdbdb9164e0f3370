"""Follows plans, and records the latents of unaccelerated runs, for fits and searches."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lesa_kernels.checks import check_int
from lesa_kernels.plan import Plan
from lesa_kernels.session import Session
from lesa_kernels.trajectories import ModelCall, StepPolicy, StopRun, TrajectorySource, watch

# Of the way that the latents went; rounding to bfloat16 in every step makes up a hundredth.
_EULER_TOLERANCE = 0.05


def run_until_stopped(source: TrajectorySource, runs: Sequence[int], policy: StepPolicy) -> None:
    """Sample runs until their end, or until the policy stops them."""
    try:
        source.run(runs, policy)
    except StopRun:
        return


def batches(source: TrajectorySource, batch: int) -> list[range]:
    """Split all runs of a source into batches.

    Raises:
        ValueError: when the batch is not positive.
    """
    batch = check_int("batch", batch, 1)
    return [range(start, min(start + batch, len(source))) for start in range(0, len(source), batch)]


def euler(call: ModelCall, output: Tensor, sigmas: Sequence[float], sign: float = 1.0) -> Tensor:
    """Return the latents after a step of a rectified flow: latents + sign * (sigma_{s+1} - sigma_s) * output.

    Raises:
        ValueError: when the source holds features only.
    """
    if call.latents is None:
        raise ValueError("source must run a model with its latents; this one holds features only")
    return call.latents + sign * (sigmas[call.step + 1] - sigmas[call.step]) * output


@dataclass
class PlanPolicy:
    """Answers calls by a plan: with the blocks on full steps, with forecasts on the others. Measures their times.

    Args:
        plan: of the only branch.
        sign: of the output, see `Reference`.
        final: latents at the end of the run, by Euler's last step.
        full_seconds: of each call whose blocks ran, until the device was done.
        forecast_seconds: of each other call.
    """

    plan: Plan
    sign: float = 1.0
    final: Tensor | None = None
    full_seconds: list[float] = field(default_factory=list)
    forecast_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._session = Session(self.plan)

    def __call__(self, call: ModelCall) -> Tensor | None:
        """Answer a call."""
        _wait(call.latents)
        begin = time.perf_counter()
        is_full = self.plan.is_full(call.step)
        if is_full:
            feature, output = watch(call)
            self._session.push(call.step, feature)
        else:
            output = None if call.tail is None else call.tail(self._session.forecast(call.step))
        if output is not None and call.latents is not None and call.step == self.plan.num_steps - 1:
            self.final = euler(call, output, self.plan.sigmas, self.sign).detach()
        _wait(call.latents)
        (self.full_seconds if is_full else self.forecast_seconds).append(time.perf_counter() - begin)
        return output


def _wait(tensor: Tensor | None) -> None:
    """Wait for the device of a tensor, so that times are those of the work."""
    if tensor is not None and tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


@dataclass(frozen=True)
class Reference:
    """The latents of a batch of unaccelerated runs.

    Args:
        latents: before some steps, S standing for the end of the run; [B, ...] by step.
        sign: -1 where the pipeline takes the negative of what its model returns (Z-Image), else 1.
    """

    latents: Mapping[int, Tensor]
    sign: float


@torch.no_grad()
def reference_run(source: TrajectorySource, runs: Sequence[int], steps: Sequence[int]) -> Reference:
    """Sample runs in full and keep their latents.

    Args:
        source: must run a model that is called once a step, and step as Euler does.
        runs: sampled as one batch.
        steps: before which the latents are kept; S stands for the end of the run.

    Returns:
        The latents, and what else fits must know of the runs.

    Raises:
        ValueError: when the source holds features only, calls its model more than once a step, or does not step as
            Euler does: another solver, guidance within a batch, tokens that stay as they are.
    """
    sigmas, end = source.sigmas, len(source.sigmas) - 1
    kept: dict[int, Tensor] = {}
    calls: list[tuple[ModelCall, Tensor]] = []  # the first call and the latest one, with their outputs
    moved: Tensor | None = None  # sum over steps of (sigma_{s+1} - sigma_s) * output, but for the last step

    def policy(call: ModelCall) -> Tensor:
        nonlocal moved
        _, output = watch(call)
        if output is None or call.latents is None:
            raise ValueError("source must run a model with its tail and latents; this one holds features only")
        if calls:
            last, its_output = calls[-1]
            if call.step == last.step:
                raise ValueError(f"source must call its model once a step, got a second call of step {call.step}")
            step = (sigmas[call.step] - sigmas[last.step]) * its_output.float()
            moved = step if moved is None else moved + step
        # A loop may write to its latents.
        call = replace(call, latents=call.latents.detach().clone())
        if call.step in steps and call.latents is not None:
            kept[call.step] = call.latents
        calls[1:] = [(call, output.detach().clone())]
        return output

    source.run(runs, policy)
    if not calls:
        raise ValueError("source must call its model, it did not")
    (first, _), (last, output), sign = calls[0], calls[-1], 1.0
    if moved is not None and first.latents is not None and last.latents is not None:
        walked = last.latents.float() - first.latents.float()
        sign = -1.0 if (walked * moved).sum() < 0 else 1.0
        error = (walked - sign * moved).norm() / walked.norm().clamp_min(1e-20)
        if error > _EULER_TOLERANCE:
            raise ValueError(
                "source must step as Euler does, latents + (sigma_next - sigma) * output, got latents that went "
                f"{100 * error:.0f} % elsewhere: another solver, guidance within a batch, or tokens that stay?"
            )
    if end in steps:
        kept[end] = euler(last, output, sigmas, sign).detach()
    return Reference(kept, sign)

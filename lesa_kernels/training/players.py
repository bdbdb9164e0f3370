"""Players that fits and searches share: one that follows plans, one that remembers where unaccelerated runs went."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lesa_kernels.plan import Plan
from lesa_kernels.session import Session
from lesa_kernels.sources import Call, Player, Source, watch


class Enough(Exception):
    """Raised by a player that has seen what it wanted of a run."""


def play(source: Source, runs: Sequence[int], player: Player) -> None:
    """Play runs until their end, or until the player has seen enough."""
    try:
        source.play(runs, player)
    except Enough:
        return


def batches(source: Source, batch: int) -> list[range]:
    """Split all runs of a source into batches.

    Raises:
        ValueError: when the batch is not positive.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return [range(start, min(start + batch, len(source))) for start in range(0, len(source), batch)]


def euler(call: Call, output: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Return the latents after a step of a rectified flow: latents + (sigma_{s+1} - sigma_s) * velocity.

    Raises:
        ValueError: when the source holds features only.
    """
    if call.latents is None:
        raise ValueError("source must play a model with its latents; this one holds features only")
    return call.latents + (sigmas[call.step + 1] - sigmas[call.step]) * output


@dataclass
class Following:
    """Plays runs by plans: blocks on full steps, forecasts on the others. Times what each kind of step takes.

    Args:
        plans: of each branch; branches without one run in full.
        sigmas: S+1 noise levels.
        final: latents at the end of the run, by Euler's last step.
        full_seconds: of each call whose blocks ran, until the device was done.
        forecast_seconds: of each other call.
    """

    plans: Mapping[str, Plan]
    sigmas: Sequence[float]
    final: Tensor | None = None
    full_seconds: list[float] = field(default_factory=list)
    forecast_seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sessions = {branch: Session(plan) for branch, plan in self.plans.items()}

    def __call__(self, call: Call) -> Tensor | None:
        """Answer a call."""
        _wait(call.latents)
        begin = time.perf_counter()
        session = self._sessions.get(call.branch)
        is_full = session is None or session.plan.is_full(call.step)
        if session is None or is_full:
            feature, output = watch(call)
            if session is not None:
                session.push(call.step, feature)
        else:
            output = None if call.tail is None else call.tail(session.forecast(call.step))
        if output is not None and call.latents is not None and call.step == len(self.sigmas) - 2:
            self.final = euler(call, output, self.sigmas).detach()
        _wait(call.latents)
        (self.full_seconds if is_full else self.forecast_seconds).append(time.perf_counter() - begin)
        return output


def _wait(tensor: Tensor | None) -> None:
    if tensor is not None and tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


@torch.no_grad()
def reference_latents(
    source: Source, runs: Sequence[int], steps: Sequence[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Play runs in full and keep their latents.

    Args:
        source: must play a model that is called once a step.
        runs: played as one batch.
        steps: before which the latents are kept; S stands for the end of the run.

    Returns:
        Latents and outputs [B, ...] by step; outputs of all steps.

    Raises:
        ValueError: when the source holds features only, or calls its model more than once a step.
    """
    latents: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}

    def player(call: Call) -> Tensor | None:
        _, output = watch(call)
        if output is None or call.latents is None:
            raise ValueError("source must play a model with its tail and latents; this one holds features only")
        if call.step in outputs:
            raise ValueError(f"source must call its model once a step, got a second call of step {call.step}")
        outputs[call.step] = output.detach().clone()
        if call.step in steps:
            latents[call.step] = call.latents.detach().clone()
        if call.step == len(source.sigmas) - 2 and call.step + 1 in steps:
            latents[call.step + 1] = euler(call, output, source.sigmas).detach()
        return output

    source.play(runs, player)
    return latents, outputs

"""Samples runs in full, and learns from them which calls a step has and how their outputs move the latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lesa_kernels.guidance import (
    Guidance,
    agrees,
    coarsest,
    find_guidance,
    is_doubled,
    own_latents,
    rounding_noise,
    seen_velocity,
)
from lesa_kernels.training.runs import SeenStep, SmallModels, StepWatcher
from lesa_kernels.trajectories import (
    HALVES,
    ONLY_BRANCH,
    ModelCall,
    StepPolicy,
    TrajectorySource,
    check_single_model,
    watch,
)


@dataclass(frozen=True)
class Branches:
    """How a source calls its model in each step: once, once a branch of guidance, or once for both branches.

    Args:
        names: of the only call, or of the two branches, the one that stands for "uncond" first.
        is_batched: whether one call holds both branches, as the halves of its batch.
        sign: -1 where the pipeline takes the negative of what its model returns (Z-Image), else 1.
    """

    names: tuple[str, ...] = (ONLY_BRANCH,)
    is_batched: bool = False
    sign: float = 1.0

    @property
    def are_guided(self) -> bool:
        """Whether there are two."""
        return len(self.names) == 2

    def split(self, called: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return what is each branch's of the feature or the output of a call, by name; see `ModelCall.branch`."""
        if self.is_batched:
            return dict(zip(self.names, tensor.chunk(2), strict=True))
        return {called: tensor}

    def own(self, latents: Tensor, output: Tensor) -> Tensor:
        """Return the latents of one branch that a call's output moves, without channels of a condition."""
        return own_latents(latents, output, self.is_batched)

    def latents_of(self, seen: SeenStep) -> Tensor:
        """Return the latents of one branch before a step."""
        return self.own(seen.latents, next(iter(seen.outputs.values())))

    def outputs_of(self, seen: SeenStep) -> dict[str, Tensor]:
        """Return the outputs of a step by branch.

        Raises:
            ValueError: when it made other calls.
        """
        outputs = {
            name: part for called, each in seen.outputs.items() for name, part in self.split(called, each).items()
        }
        if set(outputs) != set(self.names) or (self.is_batched and len(seen.outputs) > 1):
            raise ValueError(
                f"source must make the same calls in every step, {sorted(self.names)}, got {sorted(seen.outputs)} in "
                f"step {seen.step}"
            )
        return outputs

    def velocities_of(self, seen: SeenStep) -> tuple[Tensor, Tensor]:
        """Return the velocities of both branches, float32; without guidance they are one."""
        outputs = self.outputs_of(seen)
        velocities = [self.sign * outputs[name].float() for name in self.names]
        return velocities[0], velocities[-1]


@dataclass(frozen=True)
class Reference:
    """What a batch of unaccelerated runs shows.

    Args:
        latents: of one branch before each step that was asked for, S standing for the end of the run; [B, ...] by step,
            on the CPU.
        branches: of the calls.
        guidance: of each step; none where there is one branch.
        moves: [B, ..., 1]: which vectors along the last dimension move. Tokens of a condition do not. None for runs of
            one step, which do not show it.
    """

    latents: Mapping[int, Tensor]
    branches: Branches = field(default_factory=Branches)
    guidance: Mapping[int, Guidance] = field(default_factory=dict)
    moves: Tensor | None = None

    def velocity(self, step: int, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the velocity that moves the latents, [B, ...], with guidance in float32.

        Args:
            step: of the outputs.
            outputs: of the model, by branch.
        """
        names, sign = self.branches.names, self.branches.sign
        if self.branches.are_guided:
            uncond, cond = (outputs[name].float() for name in names)
            velocity = sign * self.guidance[step].combine(uncond, cond)
        else:
            velocity = sign * outputs[names[0]]
        return velocity if self.moves is None else velocity * self.moves.to(velocity)


def error_db(made: Tensor, aim: Tensor, moves: Tensor | None) -> Tensor:
    """Return -20 log10 of the relative error of each sample, [B]; tokens of a condition do not count.

    Args:
        made: [B, ...], float32.
        aim: like made, on any device: what it should be.
        moves: see `Reference`.
    """
    parts = [made, aim.to(made)] if moves is None else [made * moves, aim.to(made) * moves]
    error, size = (part.flatten(1).norm(dim=1) for part in (parts[0] - parts[1], parts[1]))
    ratios: Tensor = -20 * (error / size).clamp_min(1e-6).log10()
    return ratios


@torch.no_grad()
def reference_run(
    source: TrajectorySource,
    runs: Sequence[int],
    steps: Sequence[int] | None = None,
    answer: StepPolicy | None = None,
) -> Reference:
    """Sample runs in full and keep their latents.

    Args:
        source: must step as Euler does, with guidance of two branches or without.
        runs: sampled as one batch.
        steps: before which the latents are kept, S stands for the end of the run; None keeps all.
        answer: runs the model; None takes a source of one model.

    Returns:
        The latents, and what else fits must know of the runs.

    Raises:
        ValueError: when the source holds features only, makes more than two calls a step, takes a single step with
            guidance, or does not step as Euler does: another solver, other guidance than `lesa_kernels.guidance` knows.
        FloatingPointError: when latents or outputs are not finite; names the step.
    """
    observer = _Observer(source.sigmas, len(runs), steps)
    watcher = StepWatcher(answer or _answer_in_full, observer.close)
    source.run(runs, SmallModels().limit(watcher))
    if watcher.last is None:
        raise ValueError("source must call its model, it did not")
    return observer.reference(watcher.last)


def _answer_in_full(call: ModelCall) -> Tensor | None:
    """Run the only model."""
    check_single_model(call)
    return watch(call)[1]


class _Observer:
    """Learns from each step of a run in full."""

    def __init__(self, sigmas: Sequence[float], rows: int, steps: Sequence[int] | None) -> None:
        self._sigmas = sigmas
        self._rows = rows
        self._steps = range(len(sigmas)) if steps is None else steps
        self._kept: dict[int, Tensor] = {}
        self._noise: Tensor | None = None
        self._branches: Branches | None = None
        self._guidance: dict[int, Guidance] = {}

    def close(self, done: SeenStep, after: Tensor) -> None:
        """Learn from a step once the next one has begun with other latents."""
        if after.shape != done.latents.shape:
            raise ValueError(
                f"source must keep the shape of its latents, got {tuple(after.shape)} after {tuple(done.latents.shape)}"
            )
        tries = _possible_branches(done, self._rows) if self._branches is None else [self._branches]
        for branches in tries:
            found = self._guidance_of(branches, done, after)
            if found is not None:
                self._branches = branches
                if branches.are_guided:
                    self._guidance[done.step] = found
                break
        else:
            if not all(bool(torch.isfinite(each).all()) for each in (after, *done.outputs.values())):
                raise FloatingPointError(f"the latents or the model's output of step {done.step} are not finite")
            raise ValueError(
                "source must step as Euler does, latents + (sigma_next - sigma) * velocity, with guidance that is "
                f"linear, rescaled or norm-preserving; step {done.step} moved the latents elsewhere: another solver, "
                "stochastic sampling, skip-layer or projected guidance?"
            )
        self._keep(done.step, branches.latents_of(done))

    def _guidance_of(self, branches: Branches, done: SeenStep, after: Tensor) -> Guidance | None:
        """Return how the velocity of a step came of its branches, None where it did not."""
        before, after = branches.latents_of(done), branches.own(after, next(iter(done.outputs.values())))
        length = self._sigmas[done.step + 1] - self._sigmas[done.step]
        seen, moves = seen_velocity(before, after, length)
        uncond, cond = (each * moves for each in branches.velocities_of(done))
        noise = rounding_noise(after, seen, coarsest(before, *done.outputs.values()), abs(length))
        if not branches.are_guided:
            return Guidance(1.0) if agrees(cond, seen, noise) else None
        return find_guidance(uncond, cond, seen, noise)

    def reference(self, last: SeenStep) -> Reference:
        """Return what was seen, once the run is over and its last step is known."""
        branches = self._branches or _possible_branches(last, self._rows)[0]
        if branches.are_guided:
            if not self._guidance:
                raise ValueError("source must take at least 2 steps, which show its guidance, got 1")
            # Nothing comes after the last step that would show it.
            self._guidance[last.step] = self._guidance[max(self._guidance)]
        before = branches.latents_of(last)
        noise = before if self._noise is None else self._noise.to(before)
        moves = None if self._noise is None else (before != noise).any(-1, keepdim=True)
        found = Reference(self._kept, branches, self._guidance, moves)
        self._keep(last.step, before)
        length = self._sigmas[-1] - self._sigmas[last.step]
        end = before.float() + length * found.velocity(last.step, branches.outputs_of(last)).float()
        if not bool(torch.isfinite(end).all()):
            raise FloatingPointError(f"the latents or the model's output of step {last.step} are not finite")
        self._keep(len(self._sigmas) - 1, end)
        return found

    def _keep(self, step: int, latents: Tensor) -> None:
        """Keep latents that were asked for."""
        if self._noise is None:
            self._noise = latents.cpu()
        if step in self._steps:
            self._kept[step] = latents.cpu()


def _possible_branches(seen: SeenStep, rows: int) -> list[Branches]:
    """Return what the calls of a step may be; that two halves of a batch are branches shows in equal latents."""
    names = tuple(seen.outputs)
    orders = [names]
    is_batched = len(names) == 1 and len(seen.latents) == 2 * rows and is_doubled(seen.latents)
    if is_batched:
        orders = [HALVES]
    elif len(names) == 2:
        # Of two calls without names the rule says which is which, where that makes a difference.
        orders = [tuple(sorted(names, key=lambda name: name != "uncond"))]
        if "uncond" not in names:
            orders.append(names[::-1])
    elif len(names) > 2:
        raise ValueError(
            f"source must call its model once a step, or for two branches of guidance, got the calls {list(names)}"
        )
    known = Branches(orders[0], is_batched)
    return [replace(known, names=order, sign=sign) for sign in (1.0, -1.0) for order in orders]

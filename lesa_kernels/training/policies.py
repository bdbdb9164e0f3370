"""Follows plans, and records the latents of unaccelerated runs, for fits and searches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lesa_kernels.checks import check_int
from lesa_kernels.guidance import Guidance, find_guidance, is_doubled, rounding_noise, seen_velocity
from lesa_kernels.machine import MANY_ELEMENTS, one_thread
from lesa_kernels.plan import Plan
from lesa_kernels.session import Session
from lesa_kernels.trajectories import (
    HALVES,
    ONLY_BRANCH,
    ModelCall,
    StepPolicy,
    StopRun,
    TrajectorySource,
    check_single_model,
    watch,
)

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


class SmallModels:
    """Lets small models compute with one thread, as `train` does, once a call has shown how large their features are.

    See `lesa_kernels.machine.one_thread`.
    """

    def __init__(self) -> None:
        self._is_small = False

    def threads(self) -> AbstractContextManager[None]:
        """Return the with statement to compute in."""
        return one_thread() if self._is_small else nullcontext()

    def limit(self, policy: StepPolicy) -> StepPolicy:
        """Return a policy that answers as another does, in so many threads as the model's features need."""

        def answer(call: ModelCall) -> Tensor | None:
            def blocks() -> Tensor:
                feature = call.blocks()
                self._is_small = feature.numel() < MANY_ELEMENTS
                return feature

            with self.threads():
                return policy(replace(call, blocks=blocks))

        return answer


@dataclass(frozen=True)
class Branches:
    """How a source calls its model in each step: once, once a branch of guidance, or once for both branches.

    Args:
        names: of the only call, or of the two branches, the one that stands for "uncond" first.
        is_batched: whether one call holds both branches, as the halves of its batch.
    """

    names: tuple[str, ...] = (ONLY_BRANCH,)
    is_batched: bool = False

    def split(self, called: str, tensor: Tensor) -> dict[str, Tensor]:
        """Return what is each branch's of the feature or the output of a call, by name; see `ModelCall.branch`."""
        if self.is_batched:
            return dict(zip(self.names, tensor.chunk(2), strict=True))
        return {called: tensor}

    def own(self, latents: Tensor) -> Tensor:
        """Return the latents of one branch."""
        return latents.chunk(2)[0] if self.is_batched else latents


@dataclass(frozen=True)
class Reference:
    """What a batch of unaccelerated runs shows.

    Args:
        latents: of one branch before some steps, S standing for the end of the run; [B, ...] by step.
        sign: -1 where the pipeline takes the negative of what its model returns (Z-Image), else 1.
        branches: of the calls.
        guidance: of each step; none where there is one branch.
    """

    latents: Mapping[int, Tensor]
    sign: float = 1.0
    branches: Branches = field(default_factory=Branches)
    guidance: Mapping[int, Guidance] = field(default_factory=dict)

    def velocity(self, step: int, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the velocity that the scheduler gets, [B, ...], with guidance in float32.

        Args:
            step: of the outputs.
            outputs: of the model, by branch.
        """
        names = self.branches.names
        if len(names) == 1:
            return self.sign * outputs[names[0]]
        uncond, cond = (outputs[name].float() for name in names)
        return self.sign * self.guidance[step].combine(uncond, cond)


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
                self.final = branches.own(call.latents).detach() + length * velocity
        return output


@torch.no_grad()
def reference_run(source: TrajectorySource, runs: Sequence[int], steps: Sequence[int]) -> Reference:
    """Sample runs in full and keep their latents.

    Args:
        source: must run one model, once a step or with guidance of two branches, and step as Euler does.
        runs: sampled as one batch.
        steps: before which the latents are kept; S stands for the end of the run.

    Returns:
        The latents, and what else fits must know of the runs.

    Raises:
        ValueError: when the source holds features only, has more than two calls a step or two models, or does not step
            as Euler does: another solver, other guidance than `lesa_kernels.guidance` knows, tokens that stay.
    """
    observer = _Observer(source.sigmas, len(runs), steps)
    watcher = StepWatcher(observer.answer, observer.close)
    source.run(runs, SmallModels().limit(watcher))
    if watcher.last is None:
        raise ValueError("source must call its model, it did not")
    return observer.reference(watcher.last)


@dataclass
class SeenStep:
    """What a run shows at one step: its latents before the step, and the output of each call of the model, copied."""

    step: int
    latents: Tensor
    outputs: dict[str, Tensor] = field(default_factory=dict)


class StepWatcher:
    """A policy that answers calls by a function, and hands each step to another once the next step begins.

    Args:
        answer: call -> the model's output.
        close: takes a step and the latents after it.

    Attributes:
        last: the latest step.
    """

    def __init__(self, answer: StepPolicy, close: Callable[[SeenStep, Tensor], None]) -> None:
        self.last: SeenStep | None = None
        self._answer = answer
        self._close = close

    def __call__(self, call: ModelCall) -> Tensor:
        """Answer a call."""
        if call.latents is None or call.tail is None:
            raise ValueError("source must run a model with its tail and latents; this one holds features only")
        if self.last is None or call.step != self.last.step:
            done, self.last = self.last, SeenStep(call.step, call.latents.detach().clone())
            if done is not None:
                self._close(done, self.last.latents)
        if call.branch in self.last.outputs:
            raise ValueError(
                f"source must call its model once a step, or once for each branch, got {call.branch!r} twice in step "
                f"{call.step}"
            )
        output = self._answer(call)
        if output is None:
            raise ValueError("source must run a model with its tail; this one holds features only")
        # A loop may write to what it gets.
        self.last.outputs[call.branch] = output.detach().clone()
        return output


class _Observer:
    """Learns from runs that are sampled in full how the latents follow from the model's outputs."""

    def __init__(self, sigmas: Sequence[float], rows: int, steps: Sequence[int]) -> None:
        self._sigmas = sigmas
        self._rows = rows
        self._steps = steps
        self._kept: dict[int, Tensor] = {}
        self._first: Tensor | None = None  # latents
        self._moved: Tensor | None = None  # sum over steps of (sigma_{s+1} - sigma_s) * velocity, but for the last
        self._guidance: dict[int, Guidance] = {}
        self._known = Reference({}, guidance=self._guidance)

    def answer(self, call: ModelCall) -> Tensor | None:
        """Answer a call in full."""
        check_single_model(call)
        return watch(call)[1]

    def reference(self, last: SeenStep) -> Reference:
        """Return what was seen, once the run is over and its last step is known."""
        if self._first is None:
            branches = _find_branches(last, self._rows)
            if len(branches.names) == 2:
                raise ValueError("source must take at least 2 steps, which show its guidance, got 1")
            self._known = replace(self._known, branches=branches)
        elif self._guidance:
            self._guidance[last.step] = self._guidance[max(self._guidance)]
        latents, sign = self._own(last.latents), self._known.sign
        outputs = self._parts(last)
        if self._moved is not None and self._first is not None:
            walked = latents.float() - self._first.float()
            if not self._guidance and (walked * self._moved).sum() < 0:
                sign = -1.0
            moved = self._moved if self._guidance else sign * self._moved
            error = (walked - moved).norm() / walked.norm().clamp_min(1e-20)
            if error > _EULER_TOLERANCE:
                raise ValueError(
                    "source must step as Euler does, latents + (sigma_next - sigma) * output, got latents that went "
                    f"{100 * error:.0f} % elsewhere: another solver, or tokens that stay?"
                )
        found = replace(self._known, latents=self._kept, sign=sign)
        self._keep(last.step, latents)
        end = len(self._sigmas) - 1
        length = self._sigmas[end] - self._sigmas[last.step]
        self._keep(end, latents + length * found.velocity(last.step, outputs))
        return found

    def close(self, done: SeenStep, after: Tensor) -> None:
        """Learn from a step once the next one has begun with other latents."""
        if after.shape != done.latents.shape:
            raise ValueError(
                f"source must keep the shape of its latents, got {tuple(after.shape)} after {tuple(done.latents.shape)}"
            )
        length = self._sigmas[done.step + 1] - self._sigmas[done.step]
        if self._first is None:
            self._known = replace(self._known, branches=_find_branches(done, self._rows))
            self._first = self._own(done.latents)
        outputs, latents = self._parts(done), self._own(done.latents)
        if len(self._known.branches.names) == 2:
            self._find_guidance(done.step, latents, self._own(after), outputs, length)
        moved = length * self._known.velocity(done.step, outputs).float()
        self._moved = moved if self._moved is None else self._moved + moved
        self._keep(done.step, latents)

    def _find_guidance(
        self, step: int, latents: Tensor, after: Tensor, outputs: Mapping[str, Tensor], length: float
    ) -> None:
        """Find out by which guidance a step moved the latents; in the first step also which branch is which."""
        seen, _ = seen_velocity(latents, after, length)
        kinds = (latents.dtype, *(output.dtype for output in outputs.values()))
        noise = rounding_noise(after, seen, max(kinds, key=lambda kind: torch.finfo(kind).eps), abs(length))
        branches, sign = self._known.branches, self._known.sign
        tries = [(branches.names, sign)]
        if not self._guidance:
            orders = [branches.names]
            if not branches.is_batched and "uncond" not in branches.names:
                orders.append(branches.names[::-1])
            tries = [(names, sign) for sign in (1.0, -1.0) for names in orders]
        for names, sign in tries:
            uncond, cond = (sign * outputs[name].float() for name in names)
            found = find_guidance(uncond, cond, seen, noise)
            if found is not None:
                self._guidance[step] = found
                self._known = replace(self._known, sign=sign, branches=replace(branches, names=names))
                return
        raise ValueError(
            "source must step as Euler does, with guidance that is linear, rescaled or norm-preserving; "
            f"step {step} moved the latents elsewhere: another solver, other guidance, or new noise?"
        )

    def _parts(self, seen: SeenStep) -> dict[str, Tensor]:
        """Return the outputs of a step by branch."""
        branches = self._known.branches
        outputs = seen.outputs
        if branches.is_batched:
            ((called, output),) = outputs.items()
            outputs = branches.split(called, output)
        if set(outputs) != set(branches.names):
            raise ValueError(
                f"source must make the same calls in every step, {sorted(branches.names)}, got {sorted(outputs)} in "
                f"step {seen.step}"
            )
        for output in outputs.values():
            if output.shape != self._own(seen.latents).shape:
                raise ValueError(
                    "the model's output must have the shape of its latents, got "
                    f"{tuple(output.shape)} for {tuple(self._own(seen.latents).shape)}: condition channels or tokens?"
                )
        return outputs

    def _own(self, latents: Tensor) -> Tensor:
        """Return the latents of one branch."""
        return self._known.branches.own(latents)

    def _keep(self, step: int, latents: Tensor) -> None:
        """Keep latents that were asked for."""
        if step in self._steps:
            self._kept[step] = latents


def _find_branches(seen: SeenStep, rows: int) -> Branches:
    """Tell guidance from the calls of a step; that two halves of a batch are branches shows in equal latents."""
    names = tuple(seen.outputs)
    if len(names) > 2:
        raise ValueError(
            f"source must call its model once a step, or for two branches of guidance, got the calls {list(names)}"
        )
    if len(names) == 1:
        if len(seen.latents) == 2 * rows and is_doubled(seen.latents):
            return Branches(HALVES, is_batched=True)
        return Branches(names)
    return Branches(names[::-1] if names[1] == "uncond" else names)

"""Hooks the models of a pipeline for the length of its run, so that a policy answers each of their calls."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lesa_kernels.integrations.cache_hooks import CacheHook
from lesa_kernels.integrations.model_calls import ForwardCall
from lesa_kernels.integrations.models import Adapter, find_other_cache
from lesa_kernels.integrations.outputs import layout_of, only_tensor, refilled, uncompiled
from lesa_kernels.integrations.steps import (
    StepPosition,
    StepTracker,
    call_name,
    find_disagreement,
    find_incompatibility,
)
from lesa_kernels.trajectories import ModelCall, StepPolicy


class AnsweredRun:
    """A run of a pipeline whose calls a policy answers, shared by the hooks of models that take turns in it."""

    def __init__(self, pipeline: Any) -> None:
        self.sigmas: tuple[float, ...] | None = None
        self.latest_step = -1
        self.policy: StepPolicy | None = None
        self.gradients = False
        self._tracker = StepTracker(pipeline)
        self._position: StepPosition | None = None

    @contextmanager
    def answered(self, policy: StepPolicy) -> Generator[None, None, None]:
        """Answer calls with a policy for the length of a with statement, one run of the pipeline.

        The policy runs with gradients where the with statement does, whatever the pipeline turns off.
        """
        self.policy, self.gradients, self.latest_step = policy, torch.is_grad_enabled(), -1
        try:
            yield
        finally:
            self.policy = None

    def place(self, context: Any, call: ForwardCall, module: nn.Module) -> tuple[int, str]:
        """Return the step and the branch of a call.

        Raises:
            ValueError: when the run cannot be followed.
        """
        position, step, number = self._tracker.place(context, call.largest_timestep())
        reason = find_incompatibility(position, step, number, find_other_cache(module))
        reason = reason or find_disagreement(position, context, step)
        if position is not self._position:
            reason = self._begin(position) or reason
        # Image-to-image begins late.
        if reason is None and step > self.latest_step + 1 and self.latest_step >= 0:
            reason = f"step {step} came where step {self.latest_step + 1} was due; a source runs every step"
        if reason is not None:
            raise ValueError(f"lesa: the pipeline cannot be run: {reason}")
        self.latest_step = step
        return step, call_name(context.name, number)

    def reset(self) -> None:
        """Forget the step; the next call begins a run."""
        self._tracker.position = self._position = None

    def _begin(self, position: StepPosition) -> str | None:
        """Begin a run; return why it cannot be followed, None if it can. All runs must have the same sigmas."""
        self._position = position
        if self.latest_step >= 0:
            return "a second denoising loop began within one call"
        if position.incompatibility is None and self.sigmas is None:
            self.sigmas = position.sigmas
        if position.sigmas and self.sigmas is not None and position.sigmas != self.sigmas:
            raise ValueError(f"lesa: all runs must have the same sigmas {self.sigmas}, got {position.sigmas}")
        return None


class TrajectoryHook(CacheHook):
    """Answers each call of a model with what a policy returns; `number` is the model's among those that take turns."""

    def __init__(
        self, model: nn.Module, adapter: Adapter, wrappers: tuple[nn.Module, ...], run: AnsweredRun, number: int
    ) -> None:
        super().__init__(model, adapter, wrappers)
        # The latest full call's output, without data: the shape and container of answers that no model call preceded.
        self.known_output: Any = None
        self._model = model
        self._run_of_all = run
        self._number = number

    @contextmanager
    def attached(self) -> Generator[None, None, None]:
        """Stand before the model, whose parameters take no gradients, for the length of a with statement."""
        self.attach(self._model)
        try:
            with _frozen(self._model):
                yield
        finally:
            self.detach(self._model)

    @uncompiled(recursive=False)
    def answer(self, call: ForwardCall, module: nn.Module) -> Any:
        """See `CacheHook.answer`."""
        run = self._run_of_all
        step, branch = run.place(self.contexts.current, call, module)
        if run.policy is None:
            raise ValueError("lesa: the pipeline cannot be run: there is no policy")
        pending = _PendingCall(self, module, call)
        timestep = call.timestep()
        with torch.set_grad_enabled(run.gradients):
            answer = run.policy(
                ModelCall(
                    step,
                    pending.blocks,
                    pending.tail,
                    only_tensor(call.latents),
                    branch,
                    self._number,
                    timestep,
                    None if timestep is None else pending.tell,
                )
            )
        return pending.output_of(answer, step)

    def reset(self) -> None:
        """See `CacheHook.reset`."""
        self._run_of_all.reset()


class _PendingCall:
    """A call of the model while a policy answers it."""

    def __init__(self, hook: TrajectoryHook, module: nn.Module, call: ForwardCall) -> None:
        self.call = call
        self._hook = hook
        self._module = module
        self._feature: Tensor | None = None
        self._full_output: Any = None
        self._latest_output: Any = None

    def tell(self, timestep: float) -> None:
        """See `ModelCall`."""
        if self._feature is not None:
            raise RuntimeError("tell must be called before blocks")
        self.call = self.call.retold(timestep) or self.call

    @torch.no_grad()
    def blocks(self) -> Tensor:
        """See `ModelCall`."""
        if self._feature is not None:
            raise RuntimeError("blocks must be called at most once in a call")
        output, feature, reason = self._hook.run_full(self._module, self.call.run)
        if feature is None or reason is not None:
            raise ValueError(f"lesa: {reason}")
        # Policies may keep it; the pipeline may write to the model's output, a CUDA graph to all that it returned.
        self._feature = feature.clone(memory_format=torch.contiguous_format)
        self._full_output = self._latest_output = output
        if (tensor := only_tensor(output)) is not None:
            self._hook.known_output = refilled(output, tensor.to("meta"))
        return self._feature

    def tail(self, feature: Tensor) -> Tensor:
        """See `ModelCall`."""
        self._latest_output = (
            self._full_output if feature is self._feature else self._hook.run_tail(feature, self._module, self.call.run)
        )
        output = only_tensor(self._latest_output)
        if output is None:
            raise ValueError(
                "lesa: the model must return one tensor, or a list of tensors of one shape, "
                f"{type(self._module).__name__} returns something else"
            )
        return output

    def output_of(self, answer: Tensor | None, step: int) -> Any:
        """Return a policy's answer as the model's output, in what the model's own lies in.

        A policy may answer without the model, once a full call has shown what its outputs look like.
        """
        output = self._hook.known_output if self._latest_output is None else self._latest_output
        tensor = only_tensor(output)
        if answer is None:
            raise TypeError(f"a policy of a pipeline must answer with an output of the model, got none at step {step}")
        if tensor is None:
            raise ValueError(
                f"a policy must call blocks before its first answer without the model, it did not by step {step}"
            )
        # An earlier call may have been of another number of runs.
        rows = layout_of(self.call.latents)[0][0] if self._latest_output is None else tensor.shape[0]
        expected = (rows, *tensor.shape[1:])
        if answer.shape != expected:
            raise ValueError(
                f"a policy must answer with an output of shape {expected}, got {tuple(answer.shape)} at step {step}"
            )
        return refilled(output, answer.detach())


@contextmanager
def _frozen(model: nn.Module) -> Generator[None, None, None]:
    """Keep a model's parameters out of gradients; offloading makes new ones, so they are known by name."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.requires_grad_(True)

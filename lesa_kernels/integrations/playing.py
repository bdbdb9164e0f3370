"""The hook of `PipelineSource`: a policy answers each call of the model."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lesa_kernels.integrations.bypass import BypassHook, attach, detach
from lesa_kernels.integrations.clock import Clock, Follower, Position
from lesa_kernels.integrations.models import Adapter
from lesa_kernels.integrations.outputs import only_tensor, refilled, uncompiled
from lesa_kernels.integrations.runs import objection_to
from lesa_kernels.trajectories import ONLY_BRANCH, ModelCall, StepPolicy


class PlayerHook(BypassHook):
    """Asks a policy what each call of a model is to return.

    Args:
        model: the model that it will hook.
        adapter: where the feature is, and what follows it.
        clock: tells step and sigmas.
        wrappers: of torch.compile around the model.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, clock: Clock, wrappers: Iterable[nn.Module] = ()) -> None:
        super().__init__(model, adapter, wrappers)
        self.sigmas: tuple[float, ...] | None = None
        self.latest_step = -1
        self._clock = clock
        self._follower = Follower(clock, self._begin)
        self._policy: StepPolicy | None = None
        self._gradients = False

    @contextmanager
    def playing(self, model: nn.Module, policy: StepPolicy) -> Generator[None, None, None]:
        """Let a policy answer the model's calls for the length of a with statement, one run of the pipeline.

        The policy runs with gradients where the with statement does, whatever the pipeline turns off.
        """
        self._policy, self._gradients, self.latest_step = policy, torch.is_grad_enabled(), -1
        attach(model, self)
        try:
            with _frozen(model):
                yield
        finally:
            detach(model)
            self._policy = None

    @uncompiled(recursive=False)
    def answer(self, call: Callable[[], Any], module: nn.Module, latents: Any) -> Any:
        """See `BypassHook.answer`."""
        context = self.contexts.context
        position, step, number = self._follower.place(context)
        reason = objection_to(position, context, step, number, getattr(module, "is_cache_enabled", False))
        if reason is None and step > self.latest_step + 1:
            reason = f"step {step} came where step {self.latest_step + 1} was due; a source runs every step"
        if reason is not None or self._policy is None:
            raise ValueError(f"lesa: the pipeline cannot be run: {reason or 'there is no policy'}")
        self.latest_step = step
        name = context.name or ONLY_BRANCH
        turn = _Turn(self, module, call)
        with torch.set_grad_enabled(self._gradients):
            answer = self._policy(
                ModelCall(
                    step, turn.blocks, turn.tail, only_tensor(latents), f"{name} {number + 1}" if number else name
                )
            )
        return turn.output_of(answer, step)

    def forget(self) -> None:
        """See `BypassHook.forget`."""
        self._follower.position = None

    def _begin(self, source: Any) -> Position:
        """Check the sigmas of a run that begins; they are the same in all runs."""
        try:
            sigmas = self._clock.levels()
        except (TypeError, ValueError) as error:
            raise ValueError(f"lesa: the noise levels of the pipeline's scheduler cannot be read: {error}") from error
        if self.latest_step >= 0:
            raise ValueError("lesa: the pipeline cannot be run: a second denoising loop began within one call")
        if self.sigmas is None:
            self.sigmas = sigmas
        if sigmas != self.sigmas:
            raise ValueError(f"lesa: all runs must have the same sigmas {self.sigmas}, got {sigmas}")
        return Position(source, sigmas)


class _Turn:
    """One call of the model, while a policy answers it.

    Args:
        hook: on the model.
        module: the model.
        call: leads to its forward.
    """

    def __init__(self, hook: BypassHook, module: nn.Module, call: Callable[[], Any]) -> None:
        self._hook = hook
        self._module = module
        self._call = call
        self._feature: Tensor | None = None
        self._full_output: Any = None
        self._latest_output: Any = None

    @torch.no_grad()
    def blocks(self) -> Tensor:
        """See `ModelCall`."""
        if self._feature is not None:
            raise RuntimeError("blocks must be called at most once in a call")
        output, feature = self._hook.full(self._call)
        if feature is None:
            raise ValueError(f"lesa: {self._hook.why_not_captured(self._module)}")
        output, reason = self._hook.check_fit(feature, output, self._module, self._call)
        if reason is not None:
            raise ValueError(f"lesa: {reason}")
        # Policies may keep it; the pipeline may write to the model's output, a CUDA graph to all that it returned.
        self._feature = feature.clone(memory_format=torch.contiguous_format)
        self._full_output = self._latest_output = output
        return self._feature

    def tail(self, feature: Tensor) -> Tensor:
        """See `ModelCall`."""
        self._latest_output = (
            self._full_output if feature is self._feature else self._hook.inject(feature, self._module, self._call)
        )
        output = only_tensor(self._latest_output)
        if output is None:
            raise ValueError(
                "lesa: the model must return one tensor, or a list of tensors of one shape, "
                f"{type(self._module).__name__} returns something else"
            )
        return output

    def output_of(self, answer: Tensor | None, step: int) -> Any:
        """Return a policy's answer as the model's output, in what the model's own lies in."""
        model_output = only_tensor(self._latest_output)
        if answer is None or model_output is None:
            raise TypeError(f"a policy of a pipeline must answer with what call.tail returns, got none at step {step}")
        if answer.shape != model_output.shape:
            raise ValueError(
                f"a policy must answer with an output of shape {tuple(model_output.shape)}, "
                f"got {tuple(answer.shape)} at step {step}"
            )
        return refilled(self._latest_output, answer.detach())


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

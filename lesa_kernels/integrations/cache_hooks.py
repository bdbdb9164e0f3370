"""Hooks a model, so that a forecast step runs only what follows its blocks.

`CacheHook` stands before the model in diffusers' own registry. It takes the feature out of a full step, or puts another
one in, and leaves to a subclass which of both a call does: `ForecastHook`, the hook of `lesa.enable`, and
`TrajectoryHook`, that of `PipelineSource`.
"""

from __future__ import annotations

import copy
import inspect
import threading
from abc import abstractmethod
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any, NoReturn, SupportsIndex

import torch
from diffusers.hooks.hooks import CacheContext, HookFunctionReference, HookRegistry, ModelHook, StateManager
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lesa_kernels.integrations.model_calls import ForwardCall, Parameters
from lesa_kernels.integrations.models import MODEL_OUTPUT, TIMESTEPS, Adapter, SkippableBlocks
from lesa_kernels.integrations.outputs import agree, read_output, uncompiled

_NAME = "lesa"
_UNNAMED = CacheContext("")
_copy = uncompiled()(copy.deepcopy)


class _Contexts(StateManager):
    """Receives the cache context, as diffusers' own caches do; outside of any context there is an unnamed one.

    Each thread has its own.
    """

    def __init__(self) -> None:
        super().__init__(state_cls=None)
        self._of_thread = threading.local()

    @property
    def current(self) -> CacheContext:
        """The present context of this thread."""
        return getattr(self._of_thread, "context", _UNNAMED)

    def set_context(self, context: CacheContext | None) -> None:
        """See `StateManager`."""
        self._of_thread.context = context or _UNNAMED


class CapturePoint:
    """Reads or replaces the first argument of a module.

    It works through its own attributes: a graph that it lies in has no break, takes the forecast as an input, whatever
    slot of the history it is a view of, and returns a copy of the feature.
    """

    def __init__(self) -> None:
        self.captured: Tensor | None = None
        self.forecast: Tensor | None = None
        self._module: nn.Module | None = None
        self._handle: RemovableHandle | None = None

    def attach(self, module: nn.Module) -> None:
        """Hook a module, and no other; before all other hooks, so that these see forecasts too."""
        if module is not self._module:
            self.detach()
            self._module = module
            self._handle = module.register_forward_pre_hook(self, prepend=True, with_kwargs=True)

    def detach(self) -> None:
        """Leave the module without a trace."""
        if self._handle is not None:
            self._handle.remove()
        self._module = self._handle = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See `torch.nn.Module.register_forward_pre_hook`."""
        if self.forecast is None:
            feature = args[0] if args else next(iter(kwargs.values()))
            # What comes after may write to it.
            self.captured = feature.clone(memory_format=torch.contiguous_format)
            return None
        if args:
            return (self.forecast, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): self.forecast}


class CompiledCall:
    """Takes the place of a model's compiled call, so that its hook decides before the graph what the step runs.

    The compiled call is an attribute of the model, or of a wrapper of torch.compile around it.
    """

    def __init__(self, hook: CacheHook, model: nn.Module, owner: nn.Module, name: str) -> None:
        self._hook, self._model, self._owner, self._name = hook, model, owner, name
        self._compiled: Callable[..., Any] = getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call of the model."""
        return self._hook.decide(self._compiled, self._model, args, kwargs)

    def remove(self) -> None:
        """Put the compiled call back, where nothing else took its place since."""
        if getattr(self._owner, self._name) is self:
            setattr(self._owner, self._name, self._compiled)


class CacheHook(ModelHook):
    """Stands before a model, in diffusers' own registry; a subclass answers its calls.

    `wrappers` are those of torch.compile around the model.
    """

    _is_stateful = True

    def __init__(self, model: nn.Module, adapter: Adapter, wrappers: tuple[nn.Module, ...]) -> None:
        super().__init__()
        self.adapter = adapter
        self.contexts = _Contexts()
        self._point = CapturePoint()
        self._wrappers = wrappers
        self._compiled_calls: list[CompiledCall] = []
        self._tail = adapter.tail
        if adapter.tail is not None and adapter.lora_scale:
            self._tail = apply_lora_scale(adapter.lora_scale)(adapter.tail)
        self._blocks = SkippableBlocks(model, () if adapter.tail is not None else adapter.blocks)
        self._names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._parameters = Parameters(self._names, (adapter.timestep,) if adapter.timestep else TIMESTEPS)
        self._lock = threading.RLock()
        self._thread = 0
        self._decided = False
        self._fits = adapter.tail is not None

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "lesa: an enabled model cannot be copied or pickled; call lesa.disable(...) first, and enable the copy"
        )

    @abstractmethod
    def answer(self, call: ForwardCall, module: nn.Module) -> Any:
        """Answer a call of the model, by `run_full`, by `run_tail`, or by both.

        All three are kept out of graphs.
        """

    @abstractmethod
    def reset(self) -> None:
        """Drop the run; pipelines reset their hooks at the end of a run."""

    def reset_state(self, module: nn.Module) -> nn.Module:
        """See `ModelHook`."""
        self.reset()
        self.contexts.set_context(None)
        return module

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the model's forward."""
        # Another thread's call waits in `decide` until this one is answered.
        if self._decided and (torch.compiler.is_compiling() or self._thread == threading.get_ident()):
            return self._run(module, *args, **kwargs)
        return self.decide(partial(self._run, module), module, args, kwargs)

    @uncompiled(recursive=False)
    def decide(self, run: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the model outside of any graph; `run` leads to `_run`, compiled or not."""
        with self._lock:
            self._decided, self._thread = True, threading.get_ident()
            try:
                latents = args[0] if args else kwargs[self._names[0]]
                call = ForwardCall(partial(run, *args, **kwargs), self._parameters, args, kwargs, latents)
                return self.answer(call, module)
            except BaseException:
                # Whatever comes next, it is not the step after this one.
                self.reset()
                raise
            finally:
                self._decided = False
                self._point.captured = self._point.forecast = None

    def _run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run what is due; all of this may lie within a graph."""
        if self._tail is not None and self._point.forecast is not None:
            arguments = dict(zip(self._names, args, strict=False)) | kwargs
            return self._tail(module, self._point.forecast, **arguments)
        forward: Any = self.fn_ref.original_forward
        return forward(*args, **kwargs)

    @uncompiled(recursive=False)
    def run_full(self, module: nn.Module, call: Callable[[], Any]) -> tuple[Any, Tensor | None, str | None]:
        """Run the whole model; return its output, its feature, and why forecasts cannot serve it, None if they can.

        A model without a tail is run once more, the first time, from the captured feature: the output is another one if
        the model has a second stream, or needs what its blocks return.
        """
        output, name = call(), type(module).__name__
        if self.adapter.capture == MODEL_OUTPUT:
            feature = read_output(output)
            reason = (
                "a model whose output is captured must return a Transformer2DModelOutput or a tuple of one tensor, "
                f"{name} does not"
            )
        else:
            feature = self._point.captured
            reason = "the model's forward did not reach the point where its feature is captured"
        if feature is None or self._fits:
            return output, feature, reason if feature is None else None
        # Copies, as a CUDA graph that runs again writes over what it returned; laid out as the history is.
        output, feature = _copy(output), feature.clone(memory_format=torch.contiguous_format)
        try:
            self._fits = agree(self.run_tail(feature.clone(), module, call), output)
            reason = "gives another output"
        # Whatever the model's own forward raises without its blocks; with them, it just ran.
        except Exception as error:
            reason = f"fails ({type(error).__name__}: {error})"
        reason = (
            f"{name}, given the feature captured at {self.adapter.capture!r} in place of its blocks, {reason}; "
            "register_adapter can say how to skip them"
        )
        return output, feature, None if self._fits else reason

    @uncompiled(recursive=False)
    def run_tail(self, feature: Tensor, module: nn.Module, call: Callable[[], Any]) -> Any:
        """Run what follows the blocks on a feature, and return the output."""
        self._point.forecast = feature
        try:
            if self._tail is not None:
                return call()
            # LoRA may have wrapped the module since; then the wrapper's argument is the feature.
            self._point.attach(module.get_submodule(self.adapter.capture))
            with self._blocks.skipped():
                return call()
        finally:
            self._point.captured = self._point.forecast = None

    def attach(self, model: nn.Module) -> None:
        """Put this hook on the model, its compiled calls and its capture point."""
        if self.adapter.capture != MODEL_OUTPUT:
            self._point.attach(model.get_submodule(self.adapter.capture))
        registry = HookRegistry.check_if_exists_or_initialize(model)
        with _below_offload(model):
            forward = model.forward
            registry.register_hook(self, _NAME)
            # In place of diffusers' closure, which calls pre_forward and post_forward too; this hook has neither.
            model.forward = update_wrapper(partial(_call, self.fn_ref), forward)
        registry.invalidate_child_registries_cache()
        calls = [(model, "_compiled_call_impl"), *((wrapper, "forward") for wrapper in self._wrappers)]
        self._compiled_calls = [
            CompiledCall(self, model, owner, name) for owner, name in calls if getattr(owner, name) is not None
        ]

    def detach(self, model: nn.Module) -> None:
        """Take this hook off the model without a trace."""
        self.reset()
        self._point.detach()
        for compiled in self._compiled_calls:
            compiled.remove()
        self._compiled_calls.clear()
        registry = HookRegistry.check_if_exists_or_initialize(model)
        registry.invalidate_child_registries_cache()
        if registry.get_hook(_NAME) is self:
            with _below_offload(model):
                registry.remove_hook(_NAME, recurse=False)
        # What an emptied registry leaves behind would make copies of the model call this one's forward.
        if not registry.hooks:
            del model._diffusers_hook
        forward: Any = vars(model).get("forward")
        if getattr(forward, "__func__", None) is type(model).forward and forward.__self__ is model:
            del model.forward


def find_hook(model: nn.Module) -> CacheHook | None:
    """Return the hook on a model, None if it has none."""
    registry = getattr(model, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(_NAME)


def _call(reference: HookFunctionReference, /, *args: Any, **kwargs: Any) -> Any:
    """Call what stands in for a model's forward; hooks that are removed or added change the reference."""
    return reference.forward(*args, **kwargs)


@contextmanager
def _below_offload(module: Any) -> Generator[None, None, None]:
    """Work on the forward that accelerate's offload hook wraps, if there is one.

    Pipelines take that hook off and put it on again at the end of every call; what lay above it would go with it.
    """
    if not hasattr(module, "_old_forward"):
        yield
        return
    outer = module.forward
    module.forward = module._old_forward
    try:
        yield
    finally:
        module._old_forward = module.forward
        module.forward = outer

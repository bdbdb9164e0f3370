"""The hook that can run a model without its blocks: it takes the feature out, or puts another one in."""

from __future__ import annotations

import inspect
import threading
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any, NoReturn, SupportsIndex

import torch
from diffusers.hooks.hooks import CacheContext, HookFunctionReference, HookRegistry, ModelHook, StateManager
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor, nn

from lesa_kernels.integrations.blocks import Blocks
from lesa_kernels.integrations.gates import Gates
from lesa_kernels.integrations.models import MODEL_OUTPUT, Adapter
from lesa_kernels.integrations.outputs import agree, copied, read_output, uncompiled
from lesa_kernels.integrations.tap import Tap

NAME = "lesa"


class _Context(StateManager):
    """Receives the cache context, as diffusers' own caches do; outside of any context there is an unnamed one.

    The state itself lies in `Runs`, where the calls of one step can be told apart.
    """

    def __init__(self) -> None:
        super().__init__(state_cls=None)

    @property
    def context(self) -> CacheContext:
        """See `StateManager`."""
        return self._context or _UNNAMED


_UNNAMED = CacheContext("")


class BypassHook(ModelHook):
    """Stands before a model, in diffusers' own registry; what answers a call is up to the class that derives.

    Args:
        model: the model that it will hook.
        adapter: what to skip, and how.
        wrappers: of torch.compile around the model.
    """

    _is_stateful = True

    def __init__(self, model: nn.Module, adapter: Adapter, wrappers: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.adapter = adapter
        self.tap = Tap()
        self.contexts = _Context()
        self.gates = Gates(self.decide)
        self.wrappers = tuple(wrappers)
        self._captures_output = adapter.capture == MODEL_OUTPUT
        scaled = apply_lora_scale(adapter.lora_scale) if adapter.lora_scale and adapter.tail is not None else None
        self._tail = adapter.tail if scaled is None else scaled(adapter.tail)
        self._blocks = Blocks(model, () if self._tail is not None else adapter.blocks)
        self._names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._lock = threading.RLock()
        self._thread = 0
        self._decided = False
        self._fits = self._tail is not None

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "lesa: an enabled model cannot be copied or pickled; call lesa.disable(...) first, and enable the copy"
        )

    @abstractmethod
    def answer(self, call: Callable[[], Any], module: nn.Module, latents: Any) -> Any:
        """Answer a call of the model by `full`, by `inject`, or both; kept out of graphs, as these are.

        Args:
            call: leads to the model's forward, compiled or not.
            module: the model.
            latents: the first argument of the call.

        Returns:
            As the model's forward.
        """

    @abstractmethod
    def forget(self) -> None:
        """Forget the run; pipelines ask for it at their end."""

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the model's forward."""
        # Another thread's call waits in `decide` until this one is answered.
        if self._decided and (torch.compiler.is_compiling() or self._thread == threading.get_ident()):
            return self._run(module, *args, **kwargs)
        return self.decide(partial(self._run, module), module, args, kwargs)

    # A compiled model asks here, outside of any graph; what `run` leads to is compiled.
    @uncompiled(recursive=False)
    def decide(self, run: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the model.

        Args:
            run: leads to `_run`, directly or through the model's compiled call.
            module: the model.
            args: of the call.
            kwargs: of the call.

        Returns:
            As the model's forward.
        """
        with self._lock:
            self._decided, self._thread = True, threading.get_ident()
            try:
                latents = args[0] if args else kwargs[self._names[0]]
                return self.answer(partial(run, *args, **kwargs), module, latents)
            except BaseException:
                # Whatever comes next, it is not the step after this one.
                self.forget()
                raise
            finally:
                self._decided = False
                self.tap.clear()

    def reset_state(self, module: nn.Module) -> nn.Module:
        """See `ModelHook`."""
        self.forget()
        self.contexts.reset()
        return module

    def _run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run what is due; all of this may lie within a graph."""
        if self._tail is not None and self.tap.forecast is not None:
            arguments = dict(zip(self._names, args, strict=False)) | kwargs
            return self._tail(module, self.tap.forecast, **arguments)
        forward: Any = self.fn_ref.original_forward
        return forward(*args, **kwargs)

    @uncompiled(recursive=False)
    def full(self, call: Callable[[], Any]) -> tuple[Any, Tensor | None]:
        """Run the whole model; return its output and the feature, None where that was not there to be captured."""
        output = call()
        return output, read_output(output) if self._captures_output else self.tap.captured

    @uncompiled(recursive=False)
    def inject(self, feature: Tensor, module: nn.Module, call: Callable[[], Any]) -> Any:
        """Run what follows the blocks on a feature, and return the output."""
        self.tap.forecast = feature
        try:
            if self._tail is not None:
                return call()
            # LoRA may have wrapped the module since; then the wrapper's argument is the feature.
            self.tap.attach(module.get_submodule(self.adapter.capture))
            with self._blocks.skipped():
                return call()
        finally:
            self.tap.clear()

    @uncompiled(recursive=False)
    def check_fit(
        self, feature: Tensor, output: Any, module: nn.Module, call: Callable[[], Any]
    ) -> tuple[Any, str | None]:
        """Compare, once, a full step with its repetition from the captured feature, where no adapter vouches for it.

        A model with a second output stream, or one that needs what its blocks return, is told apart here.

        Returns:
            The output, and why forecasts cannot serve this model, None if they can.
        """
        if self._fits:
            return output, None
        # Copies, as a CUDA graph that runs again writes over what it returned; laid out as the history is.
        output = copied(output)
        try:
            repeated = self.inject(feature.clone(memory_format=torch.contiguous_format), module, call)
        # Whatever the model's own forward raises without its blocks; with them, it just ran.
        except Exception as error:
            reason = f"fails ({type(error).__name__}: {error})"
        else:
            reason = "gives another output"
            self._fits = agree(repeated, output)
        if self._fits:
            return output, None
        return output, (
            f"{type(module).__name__}, given the feature captured at {self.adapter.capture!r} in place of its "
            f"blocks, {reason}; register_adapter can say how to skip them"
        )

    def why_not_captured(self, module: nn.Module) -> str:
        """Say why a full step had no feature."""
        if self._captures_output:
            return (
                "a model whose output is captured must return a Transformer2DModelOutput or a tuple of one tensor, "
                f"{type(module).__name__} does not"
            )
        return "the model's forward did not reach the point where its feature is captured"


def attach(model: nn.Module, root: BypassHook) -> None:
    """Register a root hook, and its tap where the adapter says."""
    if root.adapter.capture != MODEL_OUTPUT:
        root.tap.attach(model.get_submodule(root.adapter.capture))
    with _below_offload(model):
        forward = model.forward
        HookRegistry.check_if_exists_or_initialize(model).register_hook(root, NAME)
        # In place of diffusers' closure, which calls pre_forward and post_forward too; this hook has neither.
        model.forward = update_wrapper(partial(_call, root.fn_ref), forward)
    HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
    root.gates.place(model, root.wrappers)


def _call(reference: HookFunctionReference, /, *args: Any, **kwargs: Any) -> Any:
    """Call what stands in for a model's forward; hooks that are removed or added change the reference."""
    return reference.forward(*args, **kwargs)


def attached(model: nn.Module) -> BypassHook | None:
    """Return the root hook of a model, None if it has none."""
    registry = getattr(model, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(NAME)


def detach(model: nn.Module) -> BypassHook | None:
    """Remove the hooks of a model without a trace and return the root hook, None if there was none."""
    root = attached(model)
    if root is None:
        return None
    root.forget()
    root.tap.detach()
    root.gates.remove()
    HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
    with _below_offload(model):
        HookRegistry.check_if_exists_or_initialize(model).remove_hook(NAME, recurse=False)
    _tidy(model)
    return root


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


def _tidy(module: nn.Module) -> None:
    """Remove what an emptied registry leaves behind, so that copies of the module do not call this one's forward."""
    registry = getattr(module, "_diffusers_hook", None)
    if registry is not None and not registry.hooks:
        del module._diffusers_hook
    forward: Any = vars(module).get("forward")
    if getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module:
        del module.forward

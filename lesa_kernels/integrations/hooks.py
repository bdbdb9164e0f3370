"""The hooks themselves, in diffusers' own registry: one on the model, one on the module whose input is captured."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.hooks import CacheContext, HookRegistry, ModelHook, StateManager
from torch import nn

from lesa_kernels.integrations.adapters import Adapter, provide_adapter
from lesa_kernels.integrations.flux import FLUX
from lesa_kernels.integrations.runs import Runs, Track, uncompiled

NAME = "lesa"
provide_adapter(FLUX)


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


class CaptureHook(ModelHook):
    """Hands the first argument of a module to the track that waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.track: Track | None = None
        self.module: nn.Module | None = None

    def initialize_hook(self, module: nn.Module) -> nn.Module:
        """See `ModelHook`."""
        self.module = module
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """See `ModelHook`."""
        if self.track is not None:
            self.track.capture(args[0] if args else next(iter(kwargs.values())))
        return args, kwargs


class ModelRootHook(ModelHook):
    """Runs a model in full on full steps, and only what follows its blocks on forecast steps.

    Args:
        model: the model that it will hook.
        adapter: what to skip, and how.
        runs: decides.
    """

    _is_stateful = True

    def __init__(self, model: nn.Module, adapter: Adapter, runs: Runs) -> None:
        super().__init__()
        self.adapter = adapter
        self.runs = runs
        self.capture = CaptureHook()
        self.contexts = _Context()
        self._names = tuple(inspect.signature(type(model).forward).parameters)[1:]

    # A compiled model asks here, outside of any graph; its original forward and the tail are compiled.
    @uncompiled(recursive=False)
    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the model's forward."""
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        try:
            track = self.runs.enter(
                self.contexts.context, arguments[self._names[0]], getattr(module, "is_cache_enabled", False)
            )
            if track is None or track.is_full:
                self.capture.track = track
                forward: Any = self.fn_ref.original_forward
                output = forward(*args, **kwargs)
            else:
                output = self.adapter.skip(module, track.forecast(), **arguments)
        except BaseException:
            # Whatever comes next, it is not the step after this one.
            self.runs.forget()
            raise
        finally:
            self.capture.track = None
        self.runs.leave(track)
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget the run; pipelines ask for it at their end."""
        self.runs.forget()
        self.contexts.reset()
        return module


def attach(model: nn.Module, root: ModelRootHook) -> None:
    """Register a root hook, and its capture hook where the adapter says."""
    captured = model.get_submodule(root.adapter.capture)
    for module, hook in ((captured, root.capture), (model, root)):
        with _below_offload(module):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, NAME)
    HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()


def attached(model: nn.Module) -> ModelRootHook | None:
    """Return the root hook of a model, None if it has none."""
    registry = getattr(model, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(NAME)


def detach(model: nn.Module) -> ModelRootHook | None:
    """Remove the hooks of a model without a trace and return the root hook, None if there was none."""
    root = attached(model)
    if root is None:
        return None
    root.runs.forget()
    HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
    # The captured module is not looked up by its path: adapters such as LoRA's may have wrapped it since.
    for module in (root.capture.module, model):
        if module is not None:
            with _below_offload(module):
                HookRegistry.check_if_exists_or_initialize(module).remove_hook(NAME, recurse=False)
            _tidy(module)
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

"""The hook on a model, in diffusers' own registry: decides what a call runs and carries features to and fro."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.hooks.hooks import CacheContext, HookRegistry, ModelHook, StateManager
from torch import Tensor, nn

from lesa_kernels.integrations.adapters import MODEL_OUTPUT, Adapter, provide_adapter
from lesa_kernels.integrations.blocks import Blocks
from lesa_kernels.integrations.flux import FLUX
from lesa_kernels.integrations.gates import Gates
from lesa_kernels.integrations.qwen import QWEN_IMAGE
from lesa_kernels.integrations.runs import Runs, Track, uncompiled
from lesa_kernels.integrations.tap import Tap
from lesa_kernels.integrations.whole import HUNYUAN_VIDEO, output_tail, read_output
from lesa_kernels.integrations.zimage import Z_IMAGE

NAME = "lesa"
for shipped in (FLUX, QWEN_IMAGE, HUNYUAN_VIDEO, Z_IMAGE):
    provide_adapter(shipped)

# The tail of a compiled model is fused in another way than the same tail behind its blocks.
_TAIL_TOLERANCE = 1e-2


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


class ModelRootHook(ModelHook):
    """Runs a model in full on full steps, and only what follows its blocks on forecast steps.

    Args:
        model: the model that it will hook.
        adapter: what to skip, and how.
        runs: decides.
        wrappers: of torch.compile around the model.
    """

    _is_stateful = True

    def __init__(self, model: nn.Module, adapter: Adapter, runs: Runs, wrappers: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.adapter = adapter
        self.runs = runs
        self.tap = Tap()
        self.contexts = _Context()
        self.gates = Gates(self.decide)
        self.wrappers = tuple(wrappers)
        self._captures_output = adapter.capture == MODEL_OUTPUT
        self._skip = output_tail if self._captures_output and adapter.skip is None else adapter.skip
        self._blocks = Blocks(model, () if self._skip is not None else adapter.blocks)
        self._names = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._decided = False
        self._fits = self._skip is not None

    def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stand in for the model's forward."""
        if self._decided:
            return self._run(module, *args, **kwargs)
        return self.decide(partial(self._run, module), module, args, kwargs)

    # A compiled model asks here, outside of any graph; what `run` leads to is compiled.
    @uncompiled(recursive=False)
    def decide(self, run: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Place a call of the model among the steps and answer it.

        Args:
            run: leads to `_run`, directly or through the model's compiled call.
            module: the model.
            args: of the call.
            kwargs: of the call.

        Returns:
            As the model's forward.
        """
        self._decided = True
        call = partial(run, *args, **kwargs)
        try:
            latents = _stand_in(args[0] if args else kwargs[self._names[0]])
            track = self.runs.enter(self.contexts.context, latents, getattr(module, "is_cache_enabled", False))
            if track is None or track.is_full:
                output = self._capture(track, module, call)
            else:
                output = self._inject(track.forecast(), module, call)
        except BaseException:
            # Whatever comes next, it is not the step after this one.
            self.runs.forget()
            raise
        finally:
            self._decided = False
            self.tap.clear()
        self.runs.leave(track)
        return output

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Forget the run; pipelines ask for it at their end."""
        self.runs.forget()
        self.contexts.reset()
        return module

    def _run(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run what is due; all of this may lie within a graph."""
        if self._skip is not None and self.tap.forecast is not None:
            arguments = dict(zip(self._names, args, strict=False)) | kwargs
            return self._skip(module, self.tap.forecast, **arguments)
        forward: Any = self.fn_ref.original_forward
        return forward(*args, **kwargs)

    @uncompiled(recursive=False)
    def _capture(self, track: Track | None, module: nn.Module, call: Callable[[], Any]) -> Any:
        """Answer a full step and hand its feature to the track."""
        output = call()
        if track is None:
            return output
        feature = read_output(output) if self._captures_output else self.tap.captured
        if feature is None and self._captures_output:
            track.run.refuse(
                "a model whose output is captured must return a Transformer2DModelOutput or a tuple of one tensor, "
                f"{type(module).__name__} does not"
            )
        if feature is not None:
            track.capture(feature)
            if not self._fits:
                # Copies, as a CUDA graph that runs again writes over what it returned; laid out as the history is.
                output = _copied(output)
                self._check_fit(track, feature.clone(memory_format=torch.contiguous_format), output, module, call)
        return output

    @uncompiled(recursive=False)
    def _inject(self, feature: Tensor, module: nn.Module, call: Callable[[], Any]) -> Any:
        """Answer a forecast step."""
        self.tap.forecast = feature
        if self._skip is not None:
            return call()
        # LoRA may have wrapped the module since; then the wrapper's argument is the feature.
        self.tap.attach(module.get_submodule(self.adapter.capture))
        with self._blocks.skipped():
            return call()

    @uncompiled(recursive=False)
    def _check_fit(
        self, track: Track, feature: Tensor, output: Any, module: nn.Module, call: Callable[[], Any]
    ) -> None:
        """Compare, once, a full step with its repetition from the captured feature, where no adapter vouches for it.

        A model with a second output stream, or one that needs what its blocks return, is told apart here.
        """
        try:
            repeated = self._inject(feature, module, call)
        # Whatever the model's own forward raises without its blocks; with them, it just ran.
        except Exception as error:
            reason = f"fails ({type(error).__name__}: {error})"
        else:
            reason = "gives another output"
            self._fits = _agree(repeated, output)
        if not self._fits:
            track.run.refuse(
                f"{type(module).__name__}, given the feature captured at {self.adapter.capture!r} in place of its "
                f"blocks, {reason}; register_adapter can say how to skip them"
            )


def attach(model: nn.Module, root: ModelRootHook) -> None:
    """Register a root hook, and its tap where the adapter says."""
    if root.adapter.capture != MODEL_OUTPUT:
        root.tap.attach(model.get_submodule(root.adapter.capture))
    with _below_offload(model):
        HookRegistry.check_if_exists_or_initialize(model).register_hook(root, NAME)
    HookRegistry.check_if_exists_or_initialize(model).invalidate_child_registries_cache()
    root.gates.place(model, root.wrappers)


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


@uncompiled()
def _stand_in(latents: Any) -> Tensor:
    """Return a tensor with the layout of a model's first argument; Z-Image takes a list with one tensor an image."""
    if isinstance(latents, Tensor):
        return latents
    first = _stand_in(latents[0])
    return first.expand(len(latents), *first.shape)


def _tensors(output: Any) -> Iterator[Tensor]:
    """Return the tensors of a model's output, whatever holds them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | tuple | list):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _tensors(value)


@uncompiled()
def _copied(output: Any) -> Any:
    return copy.deepcopy(output)


@uncompiled()
def _agree(output: Any, other_output: Any) -> bool:
    """Tell whether outputs are the same but for the order of their sums."""
    some, others = list(_tensors(output)), list(_tensors(other_output))
    if [one.shape for one in some] != [other.shape for other in others]:
        return False
    return all(
        torch.allclose(
            one.float(), other.float(), rtol=0, atol=_TAIL_TOLERANCE * float(other.abs().max()), equal_nan=True
        )
        for one, other in zip(some, others, strict=True)
        if other.numel()
    )

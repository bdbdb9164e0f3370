"""Describes each model: where its feature is captured, and what runs after that point on a forecast step.

Most models need no entry, because their blocks and their capture point have the usual names. To add one that does, add
an `Adapter` to the table at the end of this file, a tiny model of its class to `tests/integrations/tiny_models.py`, and
a row to `docs/models.md`. Users register their own models with `register_adapter`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

from torch import Tensor, nn

from lesa_kernels.checks import check_type

MODEL_OUTPUT = ""
"""As a capture point: the model's output, which must be one tensor. (The path of a model within itself is empty.)"""

TRANSFORMERS = ("transformer", "transformer_2")
"""Of a pipeline, in the order of their turns; Wan 2.2 has a second one for low noise."""

TIMESTEPS = ("timestep", "timesteps", "t")
"""What models call the argument that tells them the noise level."""

# What other caches set on a model or a pipeline.
_CACHE_MARKS = {
    "_is_cached": "cache-dit, ParaAttention and nunchaku do",
    "enable_teacache": "TeaCache does",
}


@dataclass(frozen=True)
class Adapter:
    """The table entry of one model class.

    Args:
        model: name of the class; it serves subclasses too.
        capture: path of the submodule whose first argument is the feature (`norm_out`, `proj_out`, ...), or
            `MODEL_OUTPUT`. The model's output must follow from the feature and from what no block computes.
        tail: `tail(model, feature, **arguments) -> output`: what the model's forward does from the capture point on,
            and nothing else. `arguments` are those of the forward call, all by name. It must call `capture` and what
            follows as modules, so that their hooks run, and must not write to `feature`, a view of the history. None
            runs the model's own forward around its blocks and puts the forecast in at the capture point: a little
            slower, as embeddings are computed too, and checked once against a full step.
        blocks: paths of the lists of blocks that a forecast step leaves out; none takes all lists of the model whose
            names end with "blocks" or "layers".
        lora_scale: for a tail: name of the forward's argument whose entry "scale" is the LoRA scale, where the forward
            is decorated with diffusers' `apply_lora_scale`; the tail runs under the same decorator.
        timestep: name of the forward's argument that tells the model the noise level; "" takes the first that there is
            of timestep, timesteps and t.
    """

    model: str
    capture: str = "norm_out"
    tail: Callable[..., Any] | None = None
    blocks: tuple[str, ...] = ()
    lora_scale: str = ""
    timestep: str = ""

    def __post_init__(self) -> None:
        check_type("the model of an Adapter", self.model, str, "the name of a class")
        check_type("the timestep of an Adapter", self.timestep, str, "the name of an argument")
        check_type("the blocks of an Adapter", self.blocks, (tuple, list), "paths of lists of blocks")


def register_adapter(adapter: Adapter) -> None:
    """Make `lesa.enable` serve a model class, or serve it in another way; the last registration counts.

    Args:
        adapter: names the class.
    """
    check_type("adapter", adapter, Adapter, "an Adapter")
    _ADAPTERS[adapter.model] = adapter


def find_adapter(model: nn.Module, capture: str | None = None) -> Adapter:
    """Return the adapter of a model: of its class, of the nearest base that has one, or made from its structure.

    `capture` takes the place of the adapter's. `blocks` are filled in, and the `tail` where the output is captured.
    """
    check_type("capture", capture, (str, NoneType), "the path of a submodule or None")
    name = type(model).__name__
    kinds = [kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _ADAPTERS]
    adapter = _ADAPTERS[kinds[0]] if kinds else Adapter(name)
    if capture is not None and capture != adapter.capture:
        adapter = replace(adapter, capture=capture, tail=None, lora_scale="")
    try:
        captured = model.get_submodule(adapter.capture)
    except AttributeError:
        known = f"no adapter for {name}; there are adapters for {', '.join(sorted(_ADAPTERS))}, and"
        raise ValueError(
            f"lesa: {name + ':' if kinds or capture is not None else known} the model has no submodule "
            f'{adapter.capture!r} to capture at; capture="..." names another one, and register_adapter adds an adapter'
        ) from None
    if isinstance(captured, nn.ModuleList | nn.ModuleDict):
        raise ValueError(
            f"lesa: {name}: capture must be a submodule that is called, "
            f"{adapter.capture!r} is a {type(captured).__name__}"
        )
    for path in adapter.blocks:
        try:
            model.get_submodule(path)
        except AttributeError:
            raise ValueError(f"lesa: {name}: blocks of its Adapter must be submodules, there is no {path!r}") from None
    if not adapter.blocks:
        adapter = replace(adapter, blocks=find_block_lists(model))
    if adapter.capture == MODEL_OUTPUT and adapter.tail is None:
        adapter = replace(adapter, tail=output_tail)
    if not adapter.blocks and adapter.tail is None:
        raise ValueError(
            f"lesa: {name} has no list of blocks: no nn.ModuleList of its own whose name ends with blocks or "
            f"layers; register_adapter(Adapter({name!r}, blocks=(...))) says which submodules are skipped"
        )
    return adapter


def find_block_lists(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the lists of blocks that a transformer holds, as diffusers names them."""
    return tuple(
        name
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList) and name.endswith(("blocks", "layers"))
    )


def count_blocks(model: nn.Module, adapter: Adapter) -> int:
    """Count the blocks that a forecast step skips."""
    return sum(len(list(model.get_submodule(path).children())) for path in adapter.blocks)


def is_pipeline(target: Any) -> bool:
    """Whether a target has a transformer and a scheduler."""
    return hasattr(target, "scheduler") and any(hasattr(target, name) for name in TRANSFORMERS)


def find_models(target: Any) -> list[tuple[nn.Module, tuple[nn.Module, ...]]]:
    """Return the transformers of a target, each with the wrapper that torch.compile put around it, if it did."""
    found = [getattr(target, name, None) for name in TRANSFORMERS] if is_pipeline(target) else [target]
    models: list[tuple[nn.Module, tuple[nn.Module, ...]]] = []
    for model in found:
        if model is None:
            continue
        if not isinstance(model, nn.Module):
            raise TypeError(
                "lesa: target must be a pipeline with a transformer and a scheduler, or a transformer, "
                f"got {type(model).__name__}"
            )
        inner = getattr(model, "_orig_mod", None)
        models.append((inner, (model,)) if isinstance(inner, nn.Module) else (model, ()))
    if not models:
        raise TypeError("lesa: target must be a pipeline with a transformer, its transformer is None")
    return models


def find_other_cache(model: nn.Module, pipeline: Any = None) -> str | None:
    """Say which other cache answers calls of a model, None if none is known to.

    diffusers' own say so; cache-dit, ParaAttention and nunchaku mark model or pipeline; TeaCache and what is made like
    it take the place of the class's forward.
    """
    if getattr(model, "is_cache_enabled", False):
        return "a cache of diffusers is enabled on the model as well; call disable_cache() first"
    for owner in (model, pipeline):
        for mark in () if owner is None else _CACHE_MARKS:
            if vars(owner).get(mark) or getattr(type(owner), mark, False):
                return (
                    f"another cache marked the {type(owner).__name__} as its own ({mark}, as {_CACHE_MARKS[mark]}); "
                    "turn it off first"
                )
    for kind in type(model).__mro__:
        forward = vars(kind).get("forward")
        if forward is None:
            continue
        if getattr(forward, "__module__", kind.__module__) != kind.__module__:
            return (
                f"the forward of {kind.__name__} was replaced by {forward.__module__}.{forward.__qualname__}, as "
                "TeaCache and others do; put the class's own back first"
            )
        break
    return None


class _NoBlocks(nn.ModuleList):
    """Stands in for a list of blocks: a loop over it does nothing, its length and its items are those of the list.

    Models use the length to place ControlNet residuals, and DiT an embedding inside its first block.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self._modules = blocks._modules

    def __iter__(self) -> Iterator[nn.Module]:
        """Iterate over nothing."""
        return iter(())


class SkippableBlocks:
    """The lists of a model's blocks, which can be skipped."""

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._places: list[tuple[nn.Module, str, _NoBlocks]] = []
        for path in paths:
            blocks = model.get_submodule(path)
            if not isinstance(blocks, nn.ModuleList):
                raise ValueError(f"lesa: {path} must be an nn.ModuleList of blocks, got {type(blocks).__name__}")
            parent, _, name = path.rpartition(".")
            self._places.append((model.get_submodule(parent), name, _NoBlocks(blocks)))

    @contextmanager
    def skipped(self) -> Generator[None, None, None]:
        """Make the model's loops over its blocks do nothing for the length of a with statement."""
        lists = [parent._modules[name] for parent, name, _ in self._places]
        try:
            for parent, name, nothing in self._places:
                parent._modules[name] = nothing
            yield
        finally:
            for (parent, name, _), blocks in zip(self._places, lists, strict=True):
                parent._modules[name] = blocks


def flux_tail(
    model: Any,
    feature: Tensor,
    *,
    timestep: Tensor,
    pooled_projections: Tensor,
    guidance: Tensor | None = None,
    return_dict: bool = True,
    **of_the_blocks: Any,
) -> Any:
    """Run `FluxTransformer2DModel.forward` from `norm_out` on: time embedding, final norm, projection.

    The feature is [batch, image tokens, channels]; `timestep` is sigma.
    """
    # The feature has the dtype of the embedded latents, to which the forward converts both.
    times = timestep.to(feature.dtype) * 1000
    if guidance is None:
        embedding = model.time_text_embed(times, pooled_projections)
    else:
        embedding = model.time_text_embed(times, guidance.to(feature.dtype) * 1000, pooled_projections)
    return _model_output(model.proj_out(model.norm_out(feature, embedding)), return_dict)


def qwen_tail(model: Any, feature: Tensor, *, return_dict: bool = True, **of_the_blocks: Any) -> Any:
    """Run `QwenImageTransformer2DModel.forward` from `proj_out` on; the feature is [batch, image tokens, channels]."""
    return _model_output(model.proj_out(feature), return_dict)


def output_tail(model: nn.Module, feature: Tensor, *, return_dict: bool = True, **of_the_model: Any) -> Any:
    """Return a forecast of the model's output; a copy, as the caller may write to it."""
    return _model_output(feature.clone(), return_dict)


def _model_output(sample: Tensor, return_dict: bool) -> Any:
    """Return a sample in what diffusers' transformers return it in."""
    if not return_dict:
        return (sample,)
    # diffusers takes seconds to import; whoever calls a tail has it already.
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=sample)


_ADAPTERS: dict[str, Adapter] = {
    adapter.model: adapter
    for adapter in (
        # FLUX.1 (dev, schnell, Kontext, ControlNet, ...): before the final norm, as LESA published it.
        Adapter("FluxTransformer2DModel", tail=flux_tail, lora_scale="joint_attention_kwargs"),
        # Qwen-Image (and -Edit, -Lightning, ControlNet): between the final norm and the projection, as published.
        Adapter("QwenImageTransformer2DModel", capture="proj_out", tail=qwen_tail, lora_scale="attention_kwargs"),
        # HunyuanVideo: the model's output, as published.
        Adapter("HunyuanVideoTransformer3DModel", capture=MODEL_OUTPUT),
        # Z-Image: before the final layer, which is named after the patch sizes; the feature holds text tokens too.
        Adapter(
            "ZImageTransformer2DModel",
            capture="all_final_layer.2-1",
            blocks=("noise_refiner", "context_refiner", "layers"),
        ),
    )
}

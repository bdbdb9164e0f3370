"""What differs from model to model: where its feature is captured and what still runs on a forecast step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import NoneType
from typing import Any

from torch import nn

from lesa_kernels.checks import check_type
from lesa_kernels.integrations.blocks import find_block_lists

MODEL_OUTPUT = ""
"""As a capture point: the model's output, which must be one tensor. (The path of a model within itself is empty.)"""

_USUAL_CAPTURE = "norm_out"


@dataclass(frozen=True)
class Adapter:
    """The table entry of one model class.

    Args:
        model: name of the class; it serves subclasses too.
        capture: path of the submodule whose first argument is the feature (`norm_out`, `proj_out`, ...), or
            `MODEL_OUTPUT`. The model's output must follow from the feature and from what no block computes.
        skip: `skip(model, feature, **arguments) -> output`: what the model's forward does from the capture point on,
            and nothing else. `arguments` are those of the forward call, all by name. It must call `capture` and what
            follows as modules, so that their hooks run, and must not write to `feature`, a view of the history. None
            runs the model's own forward around its blocks and puts the forecast in at the capture point: a little
            slower, as embeddings are computed too, and checked once against a full step.
        blocks: paths of the lists of blocks that a forecast step leaves out; none takes all lists of the model whose
            names end with "blocks" or "layers".
    """

    model: str
    capture: str = _USUAL_CAPTURE
    skip: Callable[..., Any] | None = None
    blocks: tuple[str, ...] = ()


_ADAPTERS: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> None:
    """Make `lesa.enable` serve a model class, or serve it in another way; the last registration counts.

    Args:
        adapter: names the class.
    """
    _ADAPTERS[adapter.model] = adapter


def provide_adapter(adapter: Adapter) -> None:
    """Register an adapter unless its class has one: what ships with the package does not displace a user's own."""
    _ADAPTERS.setdefault(adapter.model, adapter)


def find_adapter(model: nn.Module, capture: str | None = None) -> Adapter:
    """Return the adapter of a model: of its class, of the nearest base that has one, or made from its structure.

    Args:
        model: a transformer.
        capture: path of the submodule whose first argument is the feature, where it is not to be the adapter's.

    Returns:
        The adapter, its `blocks` filled in.

    Raises:
        ValueError: when there is none and the model has no submodule of the usual name or no list of blocks, or has
            nothing at the capture point.
    """
    check_type("capture", capture, (str, NoneType), "the path of a submodule or None")
    name = type(model).__name__
    kinds = [kind.__name__ for kind in type(model).__mro__ if kind.__name__ in _ADAPTERS]
    adapter = _ADAPTERS[kinds[0]] if kinds else Adapter(name)
    if capture is not None and capture != adapter.capture:
        adapter = replace(adapter, capture=capture, skip=None)
    try:
        model.get_submodule(adapter.capture)
    except AttributeError:
        known = f"no adapter for {name}; there are adapters for {', '.join(sorted(_ADAPTERS))}, and"
        raise ValueError(
            f"lesa: {name + ':' if kinds or capture is not None else known} the model has no submodule "
            f'{adapter.capture!r} to capture at; capture="..." names another one, and register_adapter adds an adapter'
        ) from None
    if not adapter.blocks:
        adapter = replace(adapter, blocks=find_block_lists(model))
    if not adapter.blocks and adapter.skip is None and adapter.capture != MODEL_OUTPUT:
        raise ValueError(
            f"lesa: {name} has no list of blocks: no nn.ModuleList of its own whose name ends with blocks or "
            f"layers; register_adapter(Adapter({name!r}, blocks=(...))) says which submodules are skipped"
        )
    return adapter

"""What differs from model to model: where its feature is captured and what still runs on a forecast step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Adapter:
    """The table entry of one model class.

    Args:
        model: name of the class; it serves subclasses too.
        capture: path of the submodule whose first argument is the feature (`norm_out`, `proj_out`, ...).
        skip: `skip(model, feature, **arguments) -> output`: what the model's forward does from the capture point on,
            and nothing else. `arguments` are those of the forward call, all by name. It must call `capture` and what
            follows as modules, so that their hooks run, and must not write to `feature`, a view of the history.
    """

    model: str
    capture: str
    skip: Callable[..., Any]


_ADAPTERS: dict[str, Adapter] = {}


def register_adapter(adapter: Adapter) -> None:
    """Make `lesa.enable` serve a model class, or serve it in another way; the last registration counts."""
    _ADAPTERS[adapter.model] = adapter


def provide_adapter(adapter: Adapter) -> None:
    """Register an adapter unless its class has one: what ships with the package does not displace a user's own."""
    _ADAPTERS.setdefault(adapter.model, adapter)


def find_adapter(model: nn.Module) -> Adapter:
    """Return the adapter of a model's class or of the nearest base that has one.

    Raises:
        ValueError: when there is none.
    """
    for kind in type(model).__mro__:
        if kind.__name__ in _ADAPTERS:
            return _ADAPTERS[kind.__name__]
    raise ValueError(
        f"lesa.enable: no adapter for {type(model).__name__}; there are adapters for {', '.join(sorted(_ADAPTERS))}, "
        "and register_adapter adds one"
    )

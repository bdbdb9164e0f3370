"""Gates before compiled calls: a compiled model decides what a step runs before it enters its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import nn

Decide = Callable[[Callable[..., Any], nn.Module, tuple[Any, ...], dict[str, Any]], Any]


class Gates:
    """Takes the place of a model's compiled calls: of `model.compile()`, and of the wrapper of `torch.compile(model)`.

    Args:
        decide: `decide(compiled, model, args, kwargs)` answers a call of the model.
    """

    def __init__(self, decide: Decide) -> None:
        self._decide = decide
        self._placed: list[tuple[nn.Module, str, Any, Any]] = []

    def place(self, model: nn.Module, wrappers: Iterable[nn.Module]) -> None:
        """Stand before the compiled calls of a model.

        Args:
            model: which may be compiled in place.
            wrappers: of `torch.compile` around it.
        """
        calls = [(model, "_compiled_call_impl"), *((wrapper, "forward") for wrapper in wrappers)]
        for holder, name in calls:
            compiled = getattr(holder, name)
            if compiled is not None:
                gate = partial(self._pass, compiled, model)
                setattr(holder, name, gate)
                self._placed.append((holder, name, gate, compiled))

    def remove(self) -> None:
        """Put the compiled calls back, where nothing else took their place since."""
        for holder, name, gate, compiled in self._placed:
            if getattr(holder, name) is gate:
                setattr(holder, name, compiled)
        self._placed.clear()

    def _pass(self, compiled: Callable[..., Any], model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return self._decide(compiled, model, args, kwargs)

"""The hook at the capture point: takes the feature out on full steps, puts a forecast in on forecast steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Tap:
    """Reads or replaces the first argument of a module.

    It moves references only, through its own attributes: a graph that it lies in has no break, takes the forecast as an
    input, whatever slot of the history it is a view of, and hands the feature out.
    """

    def __init__(self) -> None:
        self.captured: Tensor | None = None
        self.forecast: Tensor | None = None
        self._module: nn.Module | None = None
        self._handle: RemovableHandle | None = None

    def attach(self, module: nn.Module) -> None:
        """Listen at a module, and at no other; before all other hooks, so that these see forecasts too."""
        if module is self._module:
            return
        self.detach()
        self._module = module
        self._handle = module.register_forward_pre_hook(self, prepend=True, with_kwargs=True)

    def detach(self) -> None:
        """Leave the module without a trace."""
        if self._handle is not None:
            self._handle.remove()
        self._module = self._handle = None

    def clear(self) -> None:
        """Let go of both features."""
        self.captured = self.forecast = None

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """See `torch.nn.Module.register_forward_pre_hook`."""
        if self.forecast is None:
            self.captured = args[0] if args else next(iter(kwargs.values()))
            return None
        if args:
            return (self.forecast, *args[1:]), kwargs
        return args, kwargs | {next(iter(kwargs)): self.forecast}

"""The hook of `lesa.enable`: decides what a call of a model runs, and carries features to the history and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from lesa_kernels.integrations.bypass import BypassHook, attach, attached, detach
from lesa_kernels.integrations.models import Adapter
from lesa_kernels.integrations.outputs import uncompiled
from lesa_kernels.integrations.runs import Runs, Track

__all__ = ["ModelRootHook", "attach", "attached", "detach"]


class ModelRootHook(BypassHook):
    """Runs a model in full on full steps, and only what follows its blocks on forecast steps.

    Args:
        model: the model that it will hook.
        adapter: what to skip, and how.
        runs: decides.
        wrappers: of torch.compile around the model.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, runs: Runs, wrappers: Iterable[nn.Module] = ()) -> None:
        super().__init__(model, adapter, wrappers)
        self.runs = runs

    @uncompiled(recursive=False)
    def answer(self, call: Callable[[], Any], module: nn.Module, latents: Any) -> Any:
        """See `BypassHook.answer`."""
        track = self.runs.enter(self.contexts.context, latents, getattr(module, "is_cache_enabled", False))
        if track is None:
            output = call()
        elif track.is_full:
            output = self._capture(track, module, call)
        else:
            output = self.inject(track.forecast(), module, call)
        self.runs.leave(track)
        return output

    def forget(self) -> None:
        """See `BypassHook.forget`."""
        self.runs.forget()

    @uncompiled(recursive=False)
    def _capture(self, track: Track, module: nn.Module, call: Callable[[], Any]) -> Any:
        """Answer a full step and hand its feature to the track."""
        output, feature = self.full(call)
        if feature is None:
            track.run.refuse(self.why_not_captured(module))
            return output
        track.capture(feature)
        output, reason = self.check_fit(feature, output, module, call)
        if reason is not None:
            track.run.refuse(reason)
        return output

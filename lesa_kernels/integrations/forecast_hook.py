"""Hooks a model for `lesa.enable`, so that its state answers each of its calls."""

from __future__ import annotations

from typing import Any

from torch import nn

from lesa_kernels.integrations.cache_hooks import CacheHook
from lesa_kernels.integrations.model_calls import ForwardCall
from lesa_kernels.integrations.models import Adapter
from lesa_kernels.integrations.outputs import uncompiled
from lesa_kernels.integrations.state import CacheState


class ForecastHook(CacheHook):
    """Runs a model in full on full steps, and only what follows its blocks on forecast steps; `state` decides."""

    def __init__(self, model: nn.Module, adapter: Adapter, wrappers: tuple[nn.Module, ...], state: CacheState) -> None:
        super().__init__(model, adapter, wrappers)
        self.state = state

    @uncompiled(recursive=False)
    def answer(self, call: ForwardCall, module: nn.Module) -> Any:
        """See `CacheHook.answer`."""
        branch = self.state.enter(self.contexts.current, call, module, self._thread)
        if branch is None:
            output = call.run()
        elif branch.solver is not None:
            output = branch.output
            if output is None:
                timestep = branch.solver.timestep(branch.step)
                retold = call if timestep is None else call.retold(timestep)
                if retold is None:
                    self.state.disable_forecasts(
                        "the predictor's first call is told another noise level, but this model is not told one number "
                        f"in a tensor as {', '.join(call.parameters.timesteps)}"
                    )
                    retold = call
                branch.solver.is_told |= retold is not call
                output = retold.run()
                self.state.capture_output(branch, call.latents, output)
        elif branch.feature is None:
            output, feature, reason = self.run_full(module, call.run)
            if reason is not None:
                self.state.disable_forecasts(reason)
            elif feature is not None:
                self.state.capture(branch, feature)
        elif self._tail is not None:
            # As `run_tail`, in fewer calls; `decide` empties the capture point.
            self._point.forecast = branch.feature
            output = call.run()
        else:
            output = self.run_tail(branch.feature, module, call.run)
        self.state.leave()
        return output

    def reset(self) -> None:
        """See `CacheHook.reset`."""
        self.state.reset()

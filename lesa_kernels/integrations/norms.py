"""The adaptive layer norm before a projection, in one pass with the forecast that goes into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.normalization import AdaLayerNormContinuous
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all_modules

from lesa_kernels.integrations.runs import Forecast
from lesa_kernels.integrations.tap import Tap

# Types of devices on which one pass was measured to be faster than the modules, with torch's names for their kernels.
_FASTER_ON = {"cpu": "CPU"}


@dataclass(frozen=True)
class NormTail:
    """The `skip` of an adapter whose feature goes into an `AdaLayerNormContinuous`, by way of `normed`.

    Args:
        skip: as in `Adapter`; it also takes a `Forecast` for the feature, where `fuses` says so.
    """

    skip: Callable[..., Any]

    def __call__(self, model: nn.Module, feature: Tensor | Forecast, **arguments: Any) -> Any:
        """See `Adapter`."""
        return self.skip(model, feature, **arguments)

    def fuses(self, norm: nn.Module, device: torch.device) -> bool:
        """Whether the norm of a forecast may take the place of the present call of a module.

        Args:
            norm: the module; it must be diffusers' own without affine parameters, and nobody may listen at it or at the
                layer norm within.
            device: of the feature.
        """
        return (
            _has_kernel(device.type)
            and type(norm) is AdaLayerNormContinuous
            and type(norm.norm) is nn.LayerNorm
            and not norm.norm.elementwise_affine
            and len(norm.norm.normalized_shape) == 1
            and _is_bare(norm)
            and _is_bare(norm.norm)
            and not hooks_of_all_modules._has_any_global_hook()
            and not torch.is_autocast_enabled(device.type)
        )


def normed(norm: Any, feature: Tensor | Forecast, embedding: Tensor) -> Tensor:
    """Return what an `AdaLayerNormContinuous` makes of a feature.

    Args:
        norm: the module; its projection of the embedding is called as a module in any case.
        feature: [batch, tokens, channels]; or a forecast, where `NormTail.fuses` allows it.
        embedding: [batch, channels of the embedding].

    Returns:
        [batch, tokens, channels]; of a forecast rounded once, instead of after each of three operations.
    """
    if isinstance(feature, Tensor):
        output: Tensor = norm(feature, embedding)
        return output
    scale, shift = norm.linear(norm.silu(embedding).to(feature.dtype)).to(feature.dtype).chunk(2, dim=1)
    return feature.normed(scale, shift, norm.norm.eps)


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of a module is its class's forward and no more, but for a tap, which a forecast passes by."""
    return not (
        module._forward_hooks
        or "forward" in vars(module)
        or module._compiled_call_impl is not None
        or any(not isinstance(hook, Tap) for hook in module._forward_pre_hooks.values())
    )


@lru_cache
def _has_kernel(device_type: str) -> bool:
    key = _FASTER_ON.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key("lesa::forecast_norm", key)

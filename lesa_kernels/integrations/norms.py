"""The adaptive layer norm before a projection, in one pass with the forecast that goes into it."""

from __future__ import annotations

import math
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

# Type of device -> torch's name for its kernels, and from how many elements on one pass was measured to be faster than
# the modules (AMD EPYC, bfloat16 and float32: even at 196,608 elements, 1.4 to 1.5 times as fast at 786,432).
_FASTER = {"cpu": ("CPU", 262144)}


@dataclass(frozen=True)
class NormTail:
    """The `skip` of an adapter whose feature goes, by way of `normed`, into `norm_out`, an `AdaLayerNormContinuous`.

    Args:
        skip: as in `Adapter`; it also takes a `Forecast` for the feature, where `fuses` says so.
    """

    skip: Callable[..., Any]

    def __call__(self, model: nn.Module, feature: Tensor | Forecast, **arguments: Any) -> Any:
        """See `Adapter`."""
        return self.skip(model, feature, **arguments)

    @staticmethod
    def fuses(model: nn.Module, latents: Tensor) -> bool:
        """Whether the norm of a forecast may take the place of the next call of `norm_out`.

        It must be diffusers' own without affine parameters, nobody may listen at it or at the layer norm within, and
        there must be enough to compute.

        Args:
            model: a transformer.
            latents: [batch, tokens, ...], on the device of the feature.
        """
        outer: Any = model.norm_out
        if type(outer) is not AdaLayerNormContinuous:
            return False
        inner = outer.norm
        return (
            type(inner) is nn.LayerNorm
            and not inner.elementwise_affine
            and len(inner.normalized_shape) == 1
            and math.prod(latents.shape[:2]) * inner.normalized_shape[0] >= _smallest(latents.device.type)
            and _is_bare(outer)
            and _is_bare(inner)
            and not hooks_of_all_modules._has_any_global_hook()
            and not torch.is_autocast_enabled(latents.device.type)
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
def _smallest(device_type: str) -> float:
    """Return from how many elements on one pass is faster than the modules; infinity where it is not."""
    key, elements = _FASTER.get(device_type, ("", 0))
    return elements if key and torch._C._dispatch_has_kernel_for_dispatch_key("lesa::forecast_norm", key) else math.inf

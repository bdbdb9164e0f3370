"""FLUX.1 (dev, schnell, Kontext, ControlNet, ...): captured before the final norm, as LESA published it."""

from __future__ import annotations

from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor

from lesa_kernels.integrations.adapters import Adapter


@apply_lora_scale("joint_attention_kwargs")  # type: ignore[untyped-decorator]
def flux_tail(
    model: Any,
    feature: Tensor,
    *,
    timestep: Tensor,
    pooled_projections: Tensor,
    guidance: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    **of_the_blocks: Any,
) -> tuple[Tensor] | Transformer2DModelOutput:
    """Run `FluxTransformer2DModel.forward` from the captured feature on: time embedding, final norm, projection.

    Args:
        model: a `FluxTransformer2DModel`.
        feature: [batch, image tokens, channels], what the blocks would have handed to `norm_out`.
        timestep: [batch], sigma.
        pooled_projections: [batch, channels of the pooled text].
        guidance: [batch], of guidance-distilled models.
        joint_attention_kwargs: its "scale" is the LoRA scale, as in the model's forward.
        return_dict: as in the model's forward.
        of_the_blocks: what only the blocks read (text, positions, ControlNet residuals, IP-Adapter).

    Returns:
        As the model's forward.
    """
    # The feature has the dtype of the embedded latents, to which the forward converts both.
    times = timestep.to(feature.dtype) * 1000
    if guidance is None:
        embedding = model.time_text_embed(times, pooled_projections)
    else:
        embedding = model.time_text_embed(times, guidance.to(feature.dtype) * 1000, pooled_projections)
    output: Tensor = model.proj_out(model.norm_out(feature, embedding))
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


FLUX = Adapter("FluxTransformer2DModel", skip=flux_tail)

"""Qwen-Image (and -Edit, -Lightning, ControlNet): captured between the final norm and the projection, as published."""

from __future__ import annotations

from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.peft_utils import apply_lora_scale
from torch import Tensor

from lesa_kernels.integrations.adapters import Adapter


@apply_lora_scale("attention_kwargs")  # type: ignore[untyped-decorator]
def qwen_tail(
    model: Any,
    feature: Tensor,
    *,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
    **of_the_blocks: Any,
) -> tuple[Tensor] | Transformer2DModelOutput:
    """Run `QwenImageTransformer2DModel.forward` from the captured feature on: the projection.

    Args:
        model: a `QwenImageTransformer2DModel`.
        feature: [batch, image tokens, channels], what `norm_out` would have handed to `proj_out`.
        attention_kwargs: its "scale" is the LoRA scale, as in the model's forward.
        return_dict: as in the model's forward.
        of_the_blocks: what only the blocks and the final norm read (text, time, shapes, ControlNet residuals).

    Returns:
        As the model's forward.
    """
    output: Tensor = model.proj_out(feature)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


QWEN_IMAGE = Adapter("QwenImageTransformer2DModel", capture="proj_out", skip=qwen_tail)

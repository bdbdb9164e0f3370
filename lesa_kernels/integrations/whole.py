"""The model's output as the feature, as LESA published it for HunyuanVideo: a forecast step runs nothing."""

from __future__ import annotations

from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from lesa_kernels.integrations.adapters import MODEL_OUTPUT, Adapter


def output_tail(
    model: nn.Module, feature: Tensor, *, return_dict: bool = True, **of_the_model: Any
) -> tuple[Tensor] | Transformer2DModelOutput:
    """Return a forecast of the model's output as the model's forward would.

    Args:
        model: any transformer whose output is one tensor.
        feature: the forecast [*output].
        return_dict: as in the model's forward.
        of_the_model: all that the model would have read.

    Returns:
        As the model's forward; a copy, as the caller may write to it.
    """
    output = feature.clone()
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def read_output(output: Any) -> Tensor | None:
    """Return the tensor of a model's output, None where `output_tail` cannot make such an output."""
    if type(output) is Transformer2DModelOutput:
        output = output.to_tuple()
    single = isinstance(output, tuple) and len(output) == 1 and isinstance(output[0], Tensor)
    return output[0] if single else None


HUNYUAN_VIDEO = Adapter("HunyuanVideoTransformer3DModel", capture=MODEL_OUTPUT)

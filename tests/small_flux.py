"""What the documents' blocks call `pipe`: diffusers' FluxPipeline with a tiny transformer and no text encoders."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "integrations"))

from tiny_pipelines import TEXT_TOKENS, flux, noise


class SmallFlux(FluxPipeline):
    """Any prompt is encoded as the same noise."""

    model_cpu_offload_seq = "transformer->vae"

    def encode_prompt(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
        return noise(1, TEXT_TOKENS, 8), noise(1, 8), torch.zeros(TEXT_TOKENS, 3)


pipe = flux(SmallFlux)
pipe.default_sample_size = 16

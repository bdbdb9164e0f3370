"""A tiny FLUX with random weights, and a pipeline with the loop of diffusers' FluxPipeline, without text encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

CHANNELS = 4
TEXT_TOKENS = 3
WIDTH = 32
NUM_BLOCKS = 3
# In the blocks, at the capture point and behind it.
LORA_TARGETS = ["to_q", "to_v", "linear", "proj_out"]


def tiny_transformer() -> FluxTransformer2DModel:
    torch.manual_seed(7)
    return FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=WIDTH // 16,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def call_arguments(latents: Tensor, sigma: float, prompt: int = 0) -> dict[str, Any]:
    """Arguments of one call of the transformer, by name; another prompt is another text."""
    batch, tokens, _ = latents.shape
    generator = torch.Generator().manual_seed(prompt)
    text = torch.randn(1, TEXT_TOKENS, 8, generator=generator).expand(batch, -1, -1)
    pooled = torch.randn(1, 8, generator=generator).expand(batch, -1)
    image_ids = torch.zeros(tokens, 3)
    image_ids[:, 2] = torch.arange(tokens)
    return {
        "hidden_states": latents,
        "encoder_hidden_states": text.to(latents.dtype),
        "pooled_projections": pooled.to(latents.dtype),
        "timestep": torch.full((batch,), sigma, dtype=latents.dtype),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "guidance": torch.full((batch,), 3.5),
    }


class TinyPipeline(DiffusionPipeline):
    """The denoising loop of FluxPipeline (strength: as FluxImg2ImgPipeline starts late)."""

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: FluxTransformer2DModel, scheduler: FlowMatchEulerDiscreteScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        steps: int = 10,
        *,
        batch: int = 1,
        tokens: int = 6,
        true_cfg: float = 1.0,
        begin: int = 0,
        cfg_from: int = 0,
        contexts: bool = True,
        seed: int = 0,
        on_step_end: Callable[[int, Tensor], Tensor] | None = None,
    ) -> Tensor:
        latents = torch.randn(batch, tokens, CHANNELS, generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=0.8)
        self.scheduler.set_begin_index(begin)
        shape = None
        for index, t in enumerate(self.scheduler.timesteps[begin:]):
            if (latents.shape, latents.dtype) != shape:
                cond, uncond = (call_arguments(latents, 1.0, prompt) for prompt in range(2))
                shape = latents.shape, latents.dtype
            now = {"hidden_states": latents, "timestep": t.expand(len(latents)) / 1000, "return_dict": False}
            with self.transformer.cache_context("cond") if contexts else nullcontext():
                velocity = self.transformer(**cond | now)[0]
            if true_cfg > 1 and index >= cfg_from:
                with self.transformer.cache_context("uncond") if contexts else nullcontext():
                    negative = self.transformer(**uncond | now)[0]
                velocity = negative + true_cfg * (velocity - negative)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
            if on_step_end is not None:
                latents = on_step_end(index, latents)
        self.maybe_free_model_hooks()
        return latents


def tiny_pipeline() -> TinyPipeline:
    pipeline = TinyPipeline(tiny_transformer(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Watch:
    """Counts the calls of all blocks and keeps what `norm_out` received, call by call."""

    def __init__(self) -> None:
        self.blocks = 0
        self.features: list[Tensor] = []


@contextmanager
def watching(model: FluxTransformer2DModel) -> Iterator[Watch]:
    """Watch a transformer through plain torch hooks."""
    watch = Watch()

    def count(*_: Any) -> None:
        watch.blocks += 1

    def keep(_: Any, arguments: tuple[Any, ...]) -> None:
        watch.features.append(arguments[0].clone())

    handles = [
        block.register_forward_hook(count) for block in (*model.transformer_blocks, *model.single_transformer_blocks)
    ]
    handles.append(model.norm_out.register_forward_pre_hook(keep))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def add_lora(pipe: TinyPipeline, name: str) -> None:
    """Give the transformer an adapter of random weights."""
    peft = pytest.importorskip("peft", reason="diffusers' LoRA needs peft")
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=LORA_TARGETS)
    pipe.transformer.add_adapter(config, adapter_name=name)

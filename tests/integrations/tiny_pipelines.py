"""Tiny pipelines of diffusers' real classes with random weights; without text encoders, prompts come as embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CosmosTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch import Tensor, nn

TEXT_TOKENS = 3
Sample = Callable[..., Tensor]
"""Samples with a pipeline and returns its latents; takes more arguments of the pipeline's call."""


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def flux_transformer(in_channels: int = 4, out_channels: int | None = None) -> FluxTransformer2DModel:
    torch.manual_seed(1)
    return FluxTransformer2DModel(
        in_channels=in_channels,
        out_channels=out_channels,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def flux(kind: type[Any], transformer: nn.Module | None = None, **parts: Any) -> Any:
    """Build a pipeline of the FLUX family."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        sample_size=32,
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0609,
        scaling_factor=1.5035,
    ).eval()
    return quiet(
        kind(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=transformer or flux_transformer(),
            **parts,
        )
    )


def flux_controlnet() -> FluxControlNetModel:
    torch.manual_seed(2)
    model = FluxControlNetModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    # Fresh ones say nothing.
    for layer in (model.controlnet_x_embedder, *model.controlnet_blocks, *model.controlnet_single_blocks):
        nn.init.normal_(layer.weight)
    return model


def flux_sample(pipe: Any, **always: Any) -> Sample:
    def sample(steps: int = 10, *, seed: int = 0, **arguments: Any) -> Tensor:
        prompt = {"prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=1), "pooled_prompt_embeds": noise(1, 8, seed=2)}
        settings = {"height": 8, "width": 8, "output_type": "latent"} | prompt | always | arguments
        generator = torch.Generator().manual_seed(seed)
        return pipe(num_inference_steps=steps, generator=generator, **settings).images

    return sample


FLUX_NEGATIVE = {
    "true_cfg_scale": 3.0,
    "negative_prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=3),
    "negative_pooled_prompt_embeds": noise(1, 8, seed=4),
}


def qwen_image() -> tuple[Any, Sample]:
    from diffusers import QwenImagePipeline

    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        axes_dims_rope=(8, 4, 4),
    ).eval()
    vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = quiet(
        QwenImagePipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    )

    def sample(steps: int = 10, *, seed: int = 0, **arguments: Any) -> Tensor:
        settings = {
            "prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=1),
            "prompt_embeds_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.long),
            "negative_prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=3),
            "negative_prompt_embeds_mask": torch.ones(1, TEXT_TOKENS, dtype=torch.long),
            "true_cfg_scale": 3.0,
            "height": 32,
            "width": 32,
            "output_type": "latent",
        }
        generator = torch.Generator().manual_seed(seed)
        return pipe(num_inference_steps=steps, generator=generator, **(settings | arguments)).images

    return pipe, sample


def hunyuan_video() -> tuple[Any, Sample]:
    from diffusers import HunyuanVideoPipeline

    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        guidance_embeds=True,
        text_embed_dim=8,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    ).eval()
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ).eval()
    pipe = quiet(
        HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            transformer=transformer,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            text_encoder_2=None,
            tokenizer_2=None,
        )
    )

    def sample(steps: int = 10, *, seed: int = 0, **arguments: Any) -> Tensor:
        settings = {
            "prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=1),
            "pooled_prompt_embeds": noise(1, 8, seed=2),
            "prompt_attention_mask": torch.ones(1, TEXT_TOKENS),
            "height": 16,
            "width": 16,
            "num_frames": 5,
            "output_type": "latent",
        }
        generator = torch.Generator().manual_seed(seed)
        return pipe(num_inference_steps=steps, generator=generator, **(settings | arguments)).frames

    return pipe, sample


def wan_transformer(seed: int) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


def wan(*, boundary: float | None = None) -> tuple[Any, Sample]:
    """Build Wan 2.1, or with a boundary Wan 2.2: its second transformer takes over below that noise level."""
    from diffusers import WanPipeline

    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    pipe = quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            transformer=wan_transformer(1),
            transformer_2=None if boundary is None else wan_transformer(2),
            boundary_ratio=boundary,
        )
    )

    def sample(steps: int = 10, *, seed: int = 0, **arguments: Any) -> Tensor:
        settings = {
            "prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=1),
            "negative_prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=2),
            "guidance_scale": 4.0,
            "height": 16,
            "width": 16,
            "num_frames": 5,
            "output_type": "latent",
        }
        generator = torch.Generator().manual_seed(seed)
        return pipe(num_inference_steps=steps, generator=generator, **(settings | arguments)).frames

    return pipe, sample


class Guard(nn.Module):
    """In place of the package that checks prompts and images of Cosmos."""

    device, dtype = torch.device("cpu"), torch.float32


def cosmos() -> tuple[Any, Sample]:
    """Build Cosmos-Predict2, whose sigmas go from 80 to 0.002."""
    from diffusers import Cosmos2TextToImagePipeline

    torch.manual_seed(0)
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        text_embed_dim=8,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        extra_pos_embed_type=None,
        concat_padding_mask=False,
    ).eval()
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    pipe = quiet(Cosmos2TextToImagePipeline(None, None, transformer, vae, scheduler, Guard()))

    def sample(steps: int = 10, *, seed: int = 0, **arguments: Any) -> Tensor:
        prompt = {
            "prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=1),
            "negative_prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=2),
        }
        settings = {"height": 32, "width": 32, "output_type": "latent"} | prompt | arguments
        generator = torch.Generator().manual_seed(seed)
        return pipe(num_inference_steps=steps, generator=generator, **settings).images

    return pipe, sample


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Count:
    """How often blocks were called."""

    blocks = 0


@contextmanager
def counting(*models: nn.Module) -> Iterator[Count]:
    """Count the calls of all blocks of some models through plain torch hooks."""
    count = Count()

    def note(*_: Any) -> None:
        count.blocks += 1

    handles = [block.register_forward_hook(note) for model in models for block in blocks_of(model)]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    names = ("transformer_blocks", "single_transformer_blocks", "blocks")
    return [block for name in names for block in getattr(model, name, ())]

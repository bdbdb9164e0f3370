"""Tiny transformers of diffusers' real classes with random weights, and the arguments of a call of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from tiny_flux import call_arguments, tiny_transformer
from torch import Tensor, nn

from lesa_kernels.integrations.models import find_block_lists

BATCH = 2
TEXT = 3
WIDTH = 32


@dataclass(frozen=True)
class Tiny:
    """A model and what a call of it takes; another seed is another image, text and noise level."""

    make: Callable[[], nn.Module]
    arguments: Callable[[int], dict[str, Any]]

    def model(self) -> nn.Module:
        torch.manual_seed(7)
        model = self.make().eval()
        # Fresh adaptive norms and projections are zero in some classes, which would hide what the blocks do.
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return model


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _times(seed: int, scale: float = 1.0) -> Tensor:
    return torch.full((BATCH,), (0.9 - 0.07 * seed) * scale)


def _flux(seed: int) -> dict[str, Any]:
    return call_arguments(_noise(seed, BATCH, 6, 4), float(_times(seed)[0]), prompt=seed)


def _qwen(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(seed, BATCH, 6, 16),
        "encoder_hidden_states": _noise(seed + 100, BATCH, TEXT, 8),
        "encoder_hidden_states_mask": torch.ones(BATCH, TEXT, dtype=torch.int64),
        "timestep": _times(seed),
        "img_shapes": [[(1, 2, 3)]] * BATCH,
    }


def _hunyuan(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(seed, BATCH, 4, 2, 4, 4),
        "timestep": _times(seed, 1000),
        "encoder_hidden_states": _noise(seed + 100, BATCH, TEXT, 8),
        "encoder_attention_mask": torch.ones(BATCH, TEXT),
        "pooled_projections": _noise(seed + 200, BATCH, 8),
        "guidance": torch.full((BATCH,), 6000.0),
    }


def _wan(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(seed, BATCH, 4, 2, 4, 4),
        "timestep": _times(seed, 1000),
        "encoder_hidden_states": _noise(seed + 100, BATCH, TEXT, 8),
    }


def _sd3(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(seed, BATCH, 4, 4, 4),
        "encoder_hidden_states": _noise(seed + 100, BATCH, TEXT, 8),
        "pooled_projections": _noise(seed + 200, BATCH, 8),
        "timestep": _times(seed, 1000),
    }


def _flux2(seed: int) -> dict[str, Any]:
    ids = torch.zeros(6, 4)
    ids[:, 2] = torch.arange(6)
    return {
        "hidden_states": _noise(seed, BATCH, 6, 4),
        "encoder_hidden_states": _noise(seed + 100, BATCH, TEXT, 8),
        "timestep": _times(seed),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 4),
        "guidance": torch.full((BATCH,), 3.5),
    }


def _ltx(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(seed, BATCH, 2 * 2 * 3, 4),
        "encoder_hidden_states": _noise(seed + 100, BATCH, TEXT, 8),
        "timestep": _times(seed, 1000),
        "encoder_attention_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "num_frames": 2,
        "height": 2,
        "width": 3,
    }


def _cogvideox(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(seed, BATCH, 2, 4, 4, 4),
        "encoder_hidden_states": _noise(seed + 100, BATCH, TEXT, 8),
        "timestep": _times(seed, 1000).long(),
    }


def _pixart(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(seed, BATCH, 4, 4, 4),
        "encoder_hidden_states": _noise(seed + 100, BATCH, TEXT, WIDTH),
        "timestep": _times(seed, 1000).long(),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _dit(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(seed, BATCH, 4, 4, 4),
        "timestep": _times(seed, 1000).long(),
        "class_labels": torch.arange(BATCH) + seed,
    }


def _z_image(seed: int) -> dict[str, Any]:
    return {
        "x": list(_noise(seed, BATCH, 4, 1, 4, 4)),
        "t": _times(seed),
        "cap_feats": list(_noise(seed + 100, BATCH, TEXT, 8)),
    }


def _hunyuan15(seed: int) -> dict[str, Any]:
    return {
        "hidden_states": _noise(seed, BATCH, 4, 2, 4, 4),
        "timestep": _times(seed, 1000),
        "encoder_hidden_states": _noise(seed + 100, BATCH, TEXT, 8),
        "encoder_attention_mask": torch.ones(BATCH, TEXT),
        "encoder_hidden_states_2": _noise(seed + 200, BATCH, TEXT, 8),
        "encoder_attention_mask_2": torch.ones(BATCH, TEXT),
        "image_embeds": _noise(seed + 300, BATCH, TEXT, 8),
    }


def _rope(tokens: int, channels: int) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(tokens), torch.ones(channels))
    return angles.cos(), angles.sin()


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def _wan_model() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        **_HEADS,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


MODELS: dict[str, Tiny] = {
    "flux": Tiny(tiny_transformer, _flux),
    "qwen": Tiny(
        lambda: diffusers.QwenImageTransformer2DModel(
            **_HEADS,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=8,
            axes_dims_rope=(4, 6, 6),
        ),
        _qwen,
    ),
    "hunyuan": Tiny(
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            **_HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=8,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        _hunyuan,
    ),
    "wan": Tiny(_wan_model, _wan),
    "sd3": Tiny(
        lambda: diffusers.SD3Transformer2DModel(
            **_HEADS,
            sample_size=4,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            joint_attention_dim=8,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=8,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
        ),
        _sd3,
    ),
    "flux2": Tiny(
        lambda: diffusers.Flux2Transformer2DModel(
            **_HEADS,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            joint_attention_dim=8,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        _flux2,
    ),
    "ltx": Tiny(
        lambda: diffusers.LTXVideoTransformer3DModel(
            **_HEADS,
            in_channels=4,
            out_channels=4,
            cross_attention_dim=WIDTH,
            num_layers=2,
            caption_channels=8,
        ),
        _ltx,
    ),
    "cogvideox": Tiny(
        lambda: diffusers.CogVideoXTransformer3DModel(
            **_HEADS,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=8,
            num_layers=2,
            sample_width=4,
            sample_height=4,
            sample_frames=5,
            max_text_seq_length=TEXT,
        ),
        _cogvideox,
    ),
    "pixart": Tiny(
        lambda: diffusers.PixArtTransformer2DModel(
            **_HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=WIDTH,
            caption_channels=WIDTH,
            sample_size=4,
        ),
        _pixart,
    ),
    "dit": Tiny(
        lambda: diffusers.DiTTransformer2DModel(
            **_HEADS, in_channels=4, out_channels=4, num_layers=2, sample_size=4, num_embeds_ada_norm=10
        ),
        _dit,
    ),
    "z_image": Tiny(
        lambda: diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=WIDTH,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 32, 32],
        ),
        _z_image,
    ),
    "hunyuan15": Tiny(
        lambda: diffusers.HunyuanVideo15Transformer3DModel(
            **_HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=8,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 6, 6),
        ),
        _hunyuan15,
    ),
}

# Configurations of these classes that take another way through their forward.
VARIANTS: dict[str, Tiny] = {
    "flux without guidance": Tiny(
        lambda: diffusers.FluxTransformer2DModel(
            **_HEADS,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            axes_dims_rope=(4, 6, 6),
        ),
        lambda seed: _flux(seed) | {"guidance": None},
    ),
    "qwen edit": Tiny(
        lambda: diffusers.QwenImageTransformer2DModel(
            **_HEADS,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=8,
            axes_dims_rope=(4, 6, 6),
            zero_cond_t=True,
        ),
        lambda seed: (
            _qwen(seed) | {"hidden_states": _noise(seed, BATCH, 12, 16), "img_shapes": [[(1, 2, 3)] * 2] * BATCH}
        ),
    ),
    "hunyuan image to video": Tiny(
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            **_HEADS,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=8,
            pooled_projection_dim=8,
            rope_axes_dim=(4, 6, 6),
            image_condition_type="token_replace",
        ),
        _hunyuan,
    ),
    "wan with a time for each token": Tiny(
        _wan_model, lambda seed: _wan(seed) | {"timestep": _times(seed, 1000)[:, None].expand(BATCH, 8)}
    ),
    "sd3 without a layer": Tiny(MODELS["sd3"].make, lambda seed: _sd3(seed) | {"skip_layers": [1]}),
    "cogvideox 1.5": Tiny(
        lambda: diffusers.CogVideoXTransformer3DModel(
            **_HEADS,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=8,
            num_layers=2,
            sample_width=4,
            sample_height=4,
            sample_frames=5,
            patch_size_t=2,
            patch_bias=False,
            use_rotary_positional_embeddings=True,
            ofs_embed_dim=8,
        ),
        lambda seed: _cogvideox(seed) | {"ofs": torch.full((BATCH,), 2.0), "image_rotary_emb": _rope(4, 16)},
    ),
    "wan vace": Tiny(
        lambda: diffusers.WanVACETransformer3DModel(
            **_HEADS,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            vace_layers=[0, 1],
            vace_in_channels=6,
            rope_max_seq_len=32,
        ),
        lambda seed: _wan(seed) | {"control_hidden_states": _noise(seed + 300, BATCH, 6, 2, 4, 4)},
    ),
}


def at_step(tiny: Tiny, step: int, sigma: float) -> dict[str, Any]:
    """Arguments of a call in a run: its latents and noise level are those of a step, all else stays."""
    always, latents = tiny.arguments(0), next(iter(tiny.arguments(0)))
    time = "t" if "t" in always else "timestep"
    return always | {latents: tiny.arguments(step)[latents], time: always[time] * (sigma / 0.9)}


@contextmanager
def block_calls(model: nn.Module) -> Iterator[list[nn.Module]]:
    """List the calls of a model's blocks, as plain torch hooks see them."""
    calls: list[nn.Module] = []
    lists = [model.get_submodule(name) for name in find_block_lists(model)]
    handles = [
        block.register_forward_hook(lambda module, *_: calls.append(module)) for blocks in lists for block in blocks
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def sample_of(output: Any) -> Tensor:
    """The tensor of a model's output; Z-Image returns a list of tensors."""
    first = output[0]
    return torch.stack(first) if isinstance(first, list) else first

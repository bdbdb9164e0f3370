"""Tiny pipelines as sources: what they are called with, and a loop that does what no source can serve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from tiny_flux import CHANNELS, TinyPipeline, tiny_pipeline
from tiny_models import MODELS
from tiny_pipelines import FLUX_NEGATIVE, flux, hunyuan_video, noise, quiet, qwen_image, wan
from torch import Tensor, nn

from lesa_kernels import Schedule, Session, TaylorSeer
from lesa_kernels.integrations import PipelineSource
from lesa_kernels.integrations.models import find_models
from lesa_kernels.trajectories import ModelCall, StepPolicy, watch

STEPS = 6
SEED = 20
SPARSE = Schedule.explicit(STEPS, (0, 1, 4))
TEXT = 3


@dataclass
class Case:
    """A pipeline, what three runs of it are called with, and where the source leaves its latents."""

    pipe: Any
    prompts: list[dict[str, Any]]
    arguments: dict[str, Any]
    latents: list[Tensor] = field(default_factory=list)

    def models(self) -> list[nn.Module]:
        return [model for model, _ in find_models(self.pipe)]

    def source(self, **options: Any) -> PipelineSource:
        def keep(pipe: Any, index: int, t: Tensor, found: dict[str, Any]) -> dict[str, Any]:
            self.latents.append(found["latents"].clone())
            return found

        settings = {"steps": STEPS, "seed": SEED, "callback_on_step_end": keep} | self.arguments | options
        return PipelineSource(self.pipe, self.prompts, **settings)

    def run(self, runs: Sequence[int], policy: StepPolicy) -> Tensor:
        self.latents.clear()
        self.source().run(runs, policy)
        return self.latents[-1]

    def plain(self, run: int) -> Tensor:
        generator = torch.Generator().manual_seed(SEED + run)
        settings = self.prompts[run] | self.arguments | {"output_type": "latent", "return_dict": False}
        output: Tensor = self.pipe(num_inference_steps=STEPS, generator=generator, **settings)[0]
        return output


def embeddings(pooled: bool = False, mask: str = "") -> list[dict[str, Any]]:
    return [
        {"prompt_embeds": noise(1, TEXT, 8, seed=10 + run)}
        | ({"pooled_prompt_embeds": noise(1, 8, seed=20 + run)} if pooled else {})
        | ({mask: torch.ones(1, TEXT, dtype=torch.long)} if mask else {})
        for run in range(3)
    ]


def flux_case() -> Case:
    return Case(flux(diffusers.FluxPipeline), embeddings(pooled=True), {"height": 8, "width": 8})


def qwen_case() -> Case:
    negative = {
        "negative_prompt_embeds": noise(1, TEXT, 8, seed=3),
        "negative_prompt_embeds_mask": torch.ones(1, TEXT, dtype=torch.long),
        "true_cfg_scale": 3.0,
    }
    return Case(qwen_image()[0], embeddings(mask="prompt_embeds_mask"), negative | {"height": 32, "width": 32})


def hunyuan_case() -> Case:
    size = {"height": 16, "width": 16, "num_frames": 5}
    return Case(hunyuan_video()[0], embeddings(pooled=True, mask="prompt_attention_mask"), size)


def wan_case(boundary: float | None = None, **guidance: float) -> Case:
    pipe = wan(boundary=boundary)[0]
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    negative = {"negative_prompt_embeds": noise(1, TEXT, 8, seed=3), "guidance_scale": 4.0}
    return Case(pipe, embeddings(), negative | guidance | {"height": 16, "width": 16, "num_frames": 5})


def wan22_case() -> Case:
    return wan_case(boundary=0.8, guidance_scale_2=2.0)


def flux_cfg_case() -> Case:
    case = flux_case()
    return Case(case.pipe, case.prompts, case.arguments | FLUX_NEGATIVE)


def sd3_case() -> Case:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1, shift_factor=0.06
    )
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=MODELS["sd3"].model(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae.eval(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    negative = {
        "negative_prompt_embeds": noise(1, TEXT, 8, seed=3),
        "negative_pooled_prompt_embeds": noise(1, 8, seed=4),
        "guidance_scale": 3.0,
    }
    return Case(quiet(pipe), embeddings(pooled=True), negative | {"height": 4, "width": 4})


def flux_image_case(strength: float) -> Case:
    case = flux_case()
    pipe = flux(diffusers.FluxImg2ImgPipeline, case.pipe.transformer)
    return Case(pipe, case.prompts, case.arguments | {"image": _image(8), "strength": strength})


def sd3_image_case(strength: float) -> Case:
    case = sd3_case()
    pipe = quiet(diffusers.StableDiffusion3Img2ImgPipeline(**case.pipe.components))
    return Case(pipe, case.prompts, case.arguments | {"image": _image(4), "strength": strength})


def _image(size: int) -> Tensor:
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def z_image_case() -> Case:
    transformer = MODELS["z_image"].model()
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.ZImagePipeline(scheduler, vae.eval(), None, None, transformer)
    prompts = [
        {
            "prompt_embeds": [noise(TEXT, 8, seed=10 + run)],
            "negative_prompt_embeds": [noise(TEXT, 8, seed=3)],
        }
        for run in range(3)
    ]
    return Case(quiet(pipe), prompts, {"guidance_scale": 2.0, "height": 16, "width": 16})


def in_full(call: ModelCall) -> Tensor:
    return watch(call)[1]  # type: ignore[return-value]


class Followed:
    """A policy that follows plans, each branch of each model through a session of its own."""

    def __init__(self, source: PipelineSource) -> None:
        self.sigmas = source.sigmas
        self.sessions: dict[tuple[str, int], Session] = {}

    def __call__(self, call: ModelCall) -> Tensor:
        key = call.branch, call.model
        if key not in self.sessions:
            plan = TaylorSeer(2, variable="sigma").plan(self.sigmas, SPARSE, first_step=call.step)
            self.sessions[key] = Session(plan)
        session = self.sessions[key]
        if session.plan.is_full(call.step):
            feature = call.blocks()
            session.push(call.step, feature)
        else:
            feature = session.forecast(call.step)
        assert call.tail is not None
        return call.tail(feature)


class Odd(TinyPipeline):
    """The loop of FLUX, as a pipeline of diffusers is called; it can do what a source cannot serve."""

    def __call__(  # type: ignore[override]
        self,
        prompt: Sequence[str] | None = None,
        num_inference_steps: int = 10,
        generator: Any = None,
        *,
        loops: int = 1,
        extra_steps: int = 0,
        on_call: Callable[[dict[str, Any]], None] | None = None,
        negative_prompt: Any = None,
        output_type: str = "latent",
        itself_without: bool = True,
        **settings: Any,
    ) -> Tensor | None:
        if on_call is not None:
            on_call({"prompt": prompt, "negative_prompt": negative_prompt})
        latents = None
        for _ in range(loops):
            call = TinyPipeline.__call__ if itself_without else TinyPipeline.__call__.__wrapped__
            latents = call(self, num_inference_steps + extra_steps, **settings)
        return latents


def odd_pipeline() -> Odd:
    tiny = tiny_pipeline()
    return Odd(tiny.transformer, tiny.scheduler)


class Strange(nn.Module):
    """A model that gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(CHANNELS, CHANNELS)])
        self.norm_out = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        out = self.norm_out(hidden_states)
        return out, out.sum(-1)

    def cache_context(self, name: str) -> Any:
        return torch.no_grad()


CASES = {
    "flux": flux_case,
    "flux cfg": flux_cfg_case,
    "qwen": qwen_case,
    "hunyuan": hunyuan_case,
    "sd3": sd3_case,
    "wan": wan_case,
    "wan 2.2": wan22_case,
    "z_image": z_image_case,
}
BRANCHES = dict.fromkeys(("flux cfg", "qwen", "wan", "wan 2.2"), ("cond", "uncond"))

"""Whole pipelines of diffusers' real classes, from tiny parts: no other loop opens the same contexts and steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_pipelines import (
    FLUX_NEGATIVE,
    Sample,
    blocks_of,
    cosmos,
    counting,
    flux,
    flux_controlnet,
    flux_sample,
    flux_transformer,
    hunyuan_video,
    noise,
    qwen_image,
    wan,
)

pytest.importorskip("transformers", reason="diffusers' pipelines import transformers")

import diffusers

from lesa_kernels import LesaPredictor, Reuse, Schedule, TaylorSeer
from lesa_kernels.integrations import LesaWarning, disable, enable, recorded, summary

# diffusers' own ControlNet of FLUX imports it from its old place; Cosmos hands torch's sigmas to NumPy in the old way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

STEPS = 10
FULL = (0, 1, 5)
SPARSE = Schedule.explicit(STEPS, FULL)
ALL = Schedule.explicit(STEPS, range(STEPS))
IMAGE = noise(1, 3, 8, 8).sigmoid()


def text_to_image() -> tuple[Any, Sample]:
    pipe = flux(diffusers.FluxPipeline)
    return pipe, flux_sample(pipe)


def several_images() -> tuple[Any, Sample]:
    pipe = flux(diffusers.FluxPipeline)
    return pipe, flux_sample(pipe, num_images_per_prompt=2)


def true_cfg() -> tuple[Any, Sample]:
    pipe = flux(diffusers.FluxPipeline)
    return pipe, flux_sample(pipe, **FLUX_NEGATIVE)


def image_to_image() -> tuple[Any, Sample]:
    pipe = flux(diffusers.FluxImg2ImgPipeline)
    return pipe, flux_sample(pipe, image=IMAGE, strength=0.7)


def image_to_image_cfg() -> tuple[Any, Sample]:
    pipe = flux(diffusers.FluxImg2ImgPipeline)
    return pipe, flux_sample(pipe, image=IMAGE, strength=0.7, **FLUX_NEGATIVE)


def inpaint() -> tuple[Any, Sample]:
    pipe = flux(diffusers.FluxInpaintPipeline)
    return pipe, flux_sample(pipe, image=IMAGE, mask_image=torch.ones(1, 1, 8, 8), strength=1.0)


def kontext() -> tuple[Any, Sample]:
    pipe = flux(diffusers.FluxKontextPipeline)
    return pipe, flux_sample(pipe, image=IMAGE, max_area=64, _auto_resize=False)


def kontext_cfg() -> tuple[Any, Sample]:
    pipe = flux(diffusers.FluxKontextPipeline)
    return pipe, flux_sample(pipe, image=IMAGE, max_area=64, _auto_resize=False, **FLUX_NEGATIVE)


def control() -> tuple[Any, Sample]:
    pipe = flux(diffusers.FluxControlPipeline, flux_transformer(in_channels=8, out_channels=4))
    return pipe, flux_sample(pipe, control_image=IMAGE)


def controlnet() -> tuple[Any, Sample]:
    pipe = flux(diffusers.FluxControlNetPipeline, controlnet=flux_controlnet())
    return pipe, flux_sample(pipe, control_image=IMAGE, controlnet_conditioning_scale=0.7)


# Pipeline, calls of the model in a step, first step.
CASES: list[tuple[Callable[[], tuple[Any, Sample]], int, int]] = [
    (text_to_image, 1, 0),
    (several_images, 1, 0),
    (true_cfg, 2, 0),
    (image_to_image, 1, 3),
    (image_to_image_cfg, 2, 3),
    (inpaint, 1, 0),
    (kontext, 1, 0),
    (kontext_cfg, 2, 0),
    (control, 1, 0),
    (controlnet, 1, 0),
    (qwen_image, 2, 0),
    (hunyuan_video, 1, 0),
    (wan, 2, 0),
    (cosmos, 2, 0),
]


@pytest.mark.parametrize(("make", "calls", "first"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_a_pipeline_skips_what_the_plan_says(make: Callable[[], tuple[Any, Sample]], calls: int, first: int) -> None:
    pipe, sample = make()
    plain = sample(STEPS)
    enable(pipe, Reuse(), ALL)
    assert torch.equal(sample(STEPS), plain)
    assert summary(pipe).forecast == 0
    enable(pipe, TaylorSeer(1), SPARSE)
    with counting(pipe.transformer) as count:
        forecast = sample(STEPS)
    assert not torch.equal(forecast, plain)
    full = len({first, *(step for step in FULL if step > first)})
    found = summary(pipe)
    assert (found.refused, found.full, found.forecast) == (None, calls * full, calls * (STEPS - first - full))
    blocks = len(blocks_of(pipe.transformer))
    assert count.blocks == blocks * found.full
    assert found.skipped_blocks == blocks * found.forecast
    assert torch.equal(sample(STEPS), forecast)
    disable(pipe)
    assert torch.equal(sample(STEPS), plain)


@pytest.mark.parametrize(("make", "calls", "first"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_noise_levels_that_are_rounded_to_bfloat16_are_known(
    make: Callable[[], tuple[Any, Sample]], calls: int, first: int
) -> None:
    """FLUX and Qwen-Image round them twice."""
    pipe, sample = make()
    told: list[torch.Tensor] = []

    def rounded(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        time = (kwargs["timestep"] * 1000).bfloat16() / 1000
        told.append(time)
        return args, kwargs | {"timestep": time.to(kwargs["timestep"].dtype)}

    enable(pipe, Reuse())
    hook = pipe.transformer.register_forward_pre_hook(rounded, with_kwargs=True)
    steps = 50
    sample(steps)
    hook.remove()
    found, full = summary(pipe), 10
    starts = first * steps // STEPS
    assert (found.refused, found.restarts, len(told)) == (None, (), calls * (steps - starts))
    assert found.full + found.forecast == len(told)
    if not first:
        assert found.full == calls * full


def test_controlnet_residuals_count_on_full_steps() -> None:
    pipe, sample = controlnet()
    enable(pipe, Reuse(), SPARSE)
    assert not torch.equal(sample(), sample(control_image=1 - IMAGE))
    assert summary(pipe).unwatched == ("controlnet_block_samples", "controlnet_single_block_samples")


def test_sizes_steps_and_numbers_of_images_change_between_calls() -> None:
    pipe, sample = text_to_image()
    enable(pipe)
    first = sample(12)
    for arguments in ({"height": 16}, {"width": 12}, {"num_images_per_prompt": 3}, {"steps": 20}, {"steps": 4}):
        sample(**({"steps": 12} | arguments))
        assert summary(pipe).refused is None and summary(pipe).forecast > 0
    assert torch.equal(sample(12), first)


def test_a_callback_interrupts() -> None:
    pipe, sample = true_cfg()
    enable(pipe, TaylorSeer(1), SPARSE)
    whole = sample()

    def stop(pipe: Any, index: int, t: torch.Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 3
        return arguments

    sample(callback_on_step_end=stop)
    assert (summary(pipe).full, summary(pipe).forecast) == (4, 4)
    assert torch.equal(sample(), whole)
    assert summary(pipe).refused is None


def test_an_exception_in_the_middle_does_not_reach_the_next_call() -> None:
    pipe, sample = image_to_image_cfg()
    enable(pipe, TaylorSeer(1), SPARSE)
    whole = sample()

    def fail(pipe: Any, index: int, t: torch.Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
        if index == 3:
            raise KeyboardInterrupt
        return arguments

    with pytest.raises(KeyboardInterrupt):
        sample(seed=1, callback_on_step_end=fail)
    assert torch.equal(sample(), whole)


def test_each_branch_of_qwen_image_has_its_own_predictor() -> None:
    pipe, sample = qwen_image()
    torch.manual_seed(3)
    stages = ((0.9, 1), (0.4, 2))
    branches = {name: LesaPredictor(STEPS, stages=stages, hidden_dim=8) for name in ("cond", "uncond")}
    for predictor in branches.values():
        for mixer in predictor.latent:
            torch.nn.init.normal_(mixer.weight)
    enable(pipe, branches, SPARSE)
    both = sample()
    assert summary(pipe).forecast > 0
    with counting(pipe.transformer) as count:
        enable(pipe, {"cond": branches["uncond"], "uncond": branches["cond"]}, SPARSE)
        assert not torch.equal(sample(), both)
    once = count.blocks
    enable(pipe, {"cond": branches["cond"]}, SPARSE)
    with (
        counting(pipe.transformer) as count,
        pytest.warns(LesaWarning, match="'uncond': there are predictors for") as caught,
    ):
        sample()
    assert len(caught) == 1
    # The branch with a predictor skips as before, the other one runs in full.
    assert count.blocks == once // 2 + STEPS * len(blocks_of(pipe.transformer))


def test_cosmos_is_forecast_at_the_levels_that_its_model_is_told() -> None:
    pipe, sample = cosmos()
    enable(pipe, TaylorSeer(order=1, variable="sigma"), SPARSE)
    with recorded(pipe) as features:
        sample()
    sigmas = pipe.scheduler.sigmas.double()
    assert sigmas[0] == 80
    levels = sigmas / (1 + sigmas)
    for branch in (0, 1):
        calls = [feature.double() for feature in features[branch::2]]
        for step, (old, new) in {2: (0, 1), 4: (0, 1), 6: (1, 5), 9: (1, 5)}.items():
            slope = (calls[new] - calls[old]) / (levels[new] - levels[old])
            torch.testing.assert_close(
                calls[step], calls[new] + (levels[step] - levels[new]) * slope, rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("boundary", [0.5, 0.9])
def test_wan_2_2_hands_over_from_one_transformer_to_the_other(boundary: float) -> None:
    pipe, sample = wan(boundary=boundary)
    plain = sample()
    models = (pipe.transformer, pipe.transformer_2)
    with counting(models[0]) as first, counting(models[1]) as second:
        sample()
    calls = [count.blocks // len(blocks_of(models[0])) // 2 for count in (first, second)]
    assert sum(calls) == STEPS and min(calls) > 0
    enable(pipe, Reuse(), ALL)
    assert torch.equal(sample(), plain)
    enable(pipe, TaylorSeer(1), SPARSE)
    with counting(*models) as count:
        forecast = sample()
    full = {*FULL, calls[0]}
    found = summary(pipe)
    assert (found.refused, found.full, found.forecast) == (None, 2 * len(full), 2 * (STEPS - len(full)))
    assert count.blocks == found.full * len(blocks_of(models[0]))
    assert torch.equal(sample(), forecast)
    disable(pipe)
    assert torch.equal(sample(), plain)
    # A cache context leaves an empty registry, with lesa or without.
    assert not any(model._diffusers_hook.hooks for model in models)

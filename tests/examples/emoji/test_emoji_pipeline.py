"""The emoji model as a pipeline of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

import lesa_kernels as lesa
from examples.emoji import emoji_model as emoji
from examples.emoji.emoji_pipeline import EmojiPipeline
from lesa_kernels.integrations import PipelineSource
from lesa_kernels.trajectories import ModelCall, watch

PROMPTS = ["red heart", "octopus"]


@pytest.fixture(scope="module")
def pipe() -> EmojiPipeline:
    pipe = EmojiPipeline.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_draws_what_the_model_draws(pipe: EmojiPipeline, guidance: float) -> None:
    noise = torch.cat([emoji.initial_noise(1, seed) for seed in (4, 5)])
    expected = emoji.solve(pipe.transformer, noise, PROMPTS, emoji.set_up(6), guidance=guidance)
    drawn = pipe(PROMPTS, None, 6, guidance, generator=seeded(4, 5), output_type="pt").images
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-4)
    assert pipe.do_classifier_free_guidance == (guidance > 1)
    given = pipe(PROMPTS, None, 6, guidance, latents=noise, output_type="pt").images
    assert torch.equal(given, drawn)


def test_a_negative_prompt_changes_the_image(pipe: EmojiPipeline) -> None:
    noise = emoji.initial_noise(2, 0)
    plain, one, each, empty = (
        pipe(PROMPTS, negative, 3, latents=noise, output_type="pt").images
        for negative in (None, "yellow heart", ["yellow heart", "yellow heart"], "")
    )
    assert torch.equal(one, each) and torch.equal(plain, empty)
    assert (one - plain).abs().max() > 0.01


def test_pictures_are_in_colour_on_white(pipe: EmojiPipeline) -> None:
    (picture,) = pipe("large red square", num_inference_steps=20, generator=seeded(0)).images
    assert isinstance(picture, Image.Image) and picture.size == (32, 32)
    red, green, blue = picture.getpixel((16, 16))
    assert min(picture.getpixel((0, 0))) > 200
    assert red > 150 and max(green, blue) < 120


@pytest.mark.parametrize("prompt", ["human heart", ["octopus", "nonsense"]])
def test_other_prompts_are_refused(pipe: EmojiPipeline, prompt: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"made of the words in names\.txt"):
        pipe(prompt)


def test_other_latents_are_refused(pipe: EmojiPipeline) -> None:
    with pytest.raises(ValueError, match=r"latents must have shape \(2, 3, 32, 32\), got \(1, 3, 32, 32\)"):
        pipe(PROMPTS, latents=emoji.initial_noise(1, 0))


def test_a_callback_sees_and_changes_the_latents(pipe: EmojiPipeline) -> None:
    steps = []

    def callback(called: Any, step: int, timestep: torch.Tensor, kept: dict[str, Any]) -> dict[str, Any]:
        assert called is pipe
        steps.append(step)
        return {"latents": torch.zeros_like(kept["latents"])} if step == 2 else kept

    drawn = pipe("octopus", num_inference_steps=3, output_type="pt", callback_on_step_end=callback).images
    assert steps == [0, 1, 2] and drawn.count_nonzero() == 0


def test_it_can_be_enabled(pipe: EmojiPipeline) -> None:
    with lesa.enabled(pipe):
        pipe("octopus", num_inference_steps=20)
        assert lesa.summary(pipe).forecast == 16


def test_it_is_a_source_of_runs(pipe: EmojiPipeline) -> None:
    source = PipelineSource(pipe, PROMPTS, steps=4, guidance_scale=3.0, seed=7)
    assert source.sigmas == pytest.approx(emoji.set_up(4))
    latents = []

    def policy(call: ModelCall) -> torch.Tensor | None:
        feature, output = watch(call)
        latents.append(call.latents)
        assert feature.shape == (4, 64, 96)  # two branches of two prompts
        return output

    source.run([0, 1], policy)
    assert len(latents) == 4
    noise = torch.cat([emoji.initial_noise(1, seed) for seed in (7, 8)])
    assert torch.equal(latents[0], torch.cat([noise] * 2))

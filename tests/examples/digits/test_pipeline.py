"""The digits model as a pipeline of diffusers."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

import lesa_kernels as lesa
from examples.digits.model import NUM_TOKENS, TOKEN_SIZE, sample
from examples.digits.pipeline import DigitsPipeline


@pytest.fixture(scope="module")
def pipe() -> DigitsPipeline:
    pipe = DigitsPipeline.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_it_draws_what_the_model_draws(pipe: DigitsPipeline) -> None:
    noise = torch.cat([torch.randn(1, NUM_TOKENS, TOKEN_SIZE, generator=each) for each in seeded(4, 5)])
    expected = sample(pipe.transformer, noise, torch.tensor([3, 7]), 6)
    images = pipe(["3", "7"], 6, seeded(4, 5), output_type="pt").images
    assert torch.equal(images, expected)


def test_pictures_have_dark_ink_on_white_paper(pipe: DigitsPipeline) -> None:
    drawn = pipe("1", 20, torch.Generator().manual_seed(0))
    (picture,) = drawn.images
    assert isinstance(picture, Image.Image) and picture.size == (28, 28)
    assert picture.getpixel((0, 0)) > 200 and min(picture.tobytes()) < 55


@pytest.mark.parametrize("prompt", ["ten", "10", ["3", ""]])
def test_other_prompts_are_refused(pipe: DigitsPipeline, prompt: str | list[str]) -> None:
    with pytest.raises(ValueError, match="prompt must be a digit from 0 to 9, got"):
        pipe(prompt)


def test_it_can_be_enabled(pipe: DigitsPipeline) -> None:
    with lesa.enabled(pipe):
        pipe("2", 20)
        assert lesa.summary(pipe).forecast == 16

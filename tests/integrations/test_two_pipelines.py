"""One transformer in two pipelines: a call that is none of the enabled one's runs in full and leaves its run alone."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from tiny_flux import NUM_BLOCKS, TinyPipeline, call_arguments, tiny_pipeline, watching
from torch import Tensor

from lesa_kernels import LesaWarning, Reuse, Schedule, TaylorSeer
from lesa_kernels.integrations import disable, enable, summary

STEPS = 10
FULL = (0, 1, 5)
SPARSE = Schedule.explicit(STEPS, FULL)
NOT_OURS = "a call runs in full that is none of the enabled run's"


def sharing(pipe: TinyPipeline) -> TinyPipeline:
    """Another pipeline with the same transformer."""
    other = TinyPipeline(pipe.transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    other.set_progress_bar_config(disable=True)
    return other


@pytest.fixture
def other(pipe: TinyPipeline) -> TinyPipeline:
    return sharing(pipe)


def test_a_run_inside_the_callback_of_another(pipe: TinyPipeline, other: TinyPipeline) -> None:
    plain = {steps: other(steps, seed=5) for steps in (STEPS, 4)}
    enable(pipe, TaylorSeer(1), SPARSE)
    expected = pipe(STEPS)
    within: list[Tensor] = []
    for steps, at in ((4, 3), (STEPS, 0), (STEPS, 5)):

        def sample(index: int, latents: Tensor, steps: int = steps, at: int = at) -> Tensor:
            if index == at:
                within.append(other(steps, seed=5))
            return latents

        with pytest.warns(LesaWarning, match=NOT_OURS) as caught:
            assert torch.equal(pipe(STEPS, on_step_end=sample), expected)
        assert len(caught) == 1
        assert torch.equal(within.pop(), plain[steps])
        assert summary(pipe).forecast == STEPS - len(FULL)


@pytest.mark.parametrize("at", [0, 1, 3, STEPS - 1])
def test_a_run_after_one_that_was_interrupted(pipe: TinyPipeline, other: TinyPipeline, at: int) -> None:
    plain = other(STEPS, seed=5)
    enable(pipe, TaylorSeer(1), SPARSE)
    expected = pipe(STEPS)

    def interrupt(index: int, latents: Tensor) -> Tensor:
        if index == at:
            raise KeyboardInterrupt
        return latents

    with pytest.raises(KeyboardInterrupt):
        pipe(STEPS, seed=3, on_step_end=interrupt)
    with pytest.warns(LesaWarning, match=NOT_OURS):
        assert torch.equal(other(STEPS, seed=5), plain)
    assert torch.equal(pipe(STEPS), expected)


def test_a_run_after_one_that_ended(pipe: TinyPipeline, other: TinyPipeline) -> None:
    plain = [other(steps, seed=5) for steps in (STEPS, 7)]
    enable(pipe, TaylorSeer(1), SPARSE)
    expected = pipe(STEPS)
    with pytest.warns(LesaWarning, match=NOT_OURS):
        assert torch.equal(other(STEPS, seed=5), plain[0])
    assert torch.equal(other(7, seed=5), plain[1])
    assert summary(pipe).forecast == STEPS - len(FULL)
    assert torch.equal(pipe(STEPS), expected)


def test_a_summary_says_why_no_call_was_of_the_run(pipe: TinyPipeline, other: TinyPipeline) -> None:
    plain = other(STEPS)
    enable(pipe)
    with pytest.warns(LesaWarning, match=NOT_OURS):
        assert torch.equal(other(STEPS), plain)
    with pytest.raises(ValueError, match="it has not, its calls ran in full: a TinyPipeline makes it that has"):
        summary(pipe)


def test_a_pipeline_that_was_enabled_before_the_other_gets_full_steps_and_the_reason(
    pipe: TinyPipeline, other: TinyPipeline
) -> None:
    plain = pipe(STEPS)
    enable(pipe, TaylorSeer(1), SPARSE)
    expected = pipe(STEPS)
    enable(other, TaylorSeer(1), SPARSE)
    assert torch.equal(other(STEPS), expected)
    with pytest.warns(LesaWarning, match=NOT_OURS):
        assert torch.equal(pipe(STEPS), plain)
    assert torch.equal(other(STEPS), expected)


def test_pipelines_that_share_a_scheduler_too_take_turns(pipe: TinyPipeline) -> None:
    """As those of `from_pipe` do."""
    other = TinyPipeline(pipe.transformer, pipe.scheduler)
    other.set_progress_bar_config(disable=True)
    enable(pipe, TaylorSeer(1), SPARSE)
    expected = pipe(STEPS)
    assert torch.equal(other(STEPS), expected)
    assert torch.equal(pipe(STEPS), expected)


class Loop:
    """A loop of one's own; with `__call__` it looks like a pipeline, with `sample` like any other code."""

    def __init__(self, transformer: FluxTransformer2DModel, conditions: dict[str, Any]) -> None:
        self.transformer, self.scheduler = transformer, FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        self._conditions = conditions

    def __call__(self, steps: int, seed: int, before: Callable[[int], Any] = lambda step: None) -> Tensor:
        return self.sample(steps, seed, before)

    @torch.no_grad()
    def sample(self, steps: int, seed: int, before: Callable[[int], Any] = lambda step: None) -> Tensor:
        latents = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(steps, mu=0.8)
        for step, t in enumerate(self.scheduler.timesteps):
            before(step)
            now = {"hidden_states": latents, "timestep": t.expand(1) / 1000}
            velocity = self.transformer(**self._conditions | now, return_dict=False)[0]
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return latents


def two_loops(shares_prompt: bool) -> tuple[Loop, Loop]:
    """Two loops of one transformer, with the very tensors of one prompt or with copies."""
    transformer, prompt = tiny_pipeline().transformer, call_arguments(torch.zeros(1, 6, 4), 1.0)
    copied = prompt if shares_prompt else {name: value.clone() for name, value in prompt.items()}
    return Loop(transformer, prompt), Loop(transformer, copied)


@pytest.mark.parametrize("way", ["__call__", "sample"])
@pytest.mark.parametrize("steps", [STEPS, 7])
@pytest.mark.parametrize("shares_prompt", [False, True])
def test_a_loop_after_one_that_was_interrupted(steps: int, shares_prompt: bool, way: str) -> None:
    ours, others = two_loops(shares_prompt)
    plain = others.sample(steps, 5)
    enable(ours, TaylorSeer(1), SPARSE)
    expected = getattr(ours, way)(STEPS, 0)

    for at in range(1, STEPS):

        def interrupt(step: int, at: int = at) -> None:
            if step == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            getattr(ours, way)(STEPS, 3, interrupt)
        with pytest.warns(LesaWarning, match=NOT_OURS):
            assert torch.equal(getattr(others, way)(steps, 5), plain)
    assert torch.equal(getattr(ours, way)(STEPS, 0), expected)


@pytest.mark.parametrize("way", ["__call__", "sample"])
@pytest.mark.parametrize("steps", [STEPS, 7])
@pytest.mark.parametrize("shares_prompt", [False, True])
def test_loops_in_two_threads(steps: int, shares_prompt: bool, way: str) -> None:
    """Call by call in turn while both sample, either one first in each step."""
    ours, others = two_loops(shares_prompt)
    plain = others.sample(steps, 5)
    enable(ours, TaylorSeer(1), SPARSE)
    expected = getattr(ours, way)(STEPS, 0)
    results: dict[str, Tensor] = {}
    both = threading.Barrier(2, timeout=60)

    def wait(step: int) -> None:
        # The enabled run's first call is the first of all.
        if 0 < step < min(steps, STEPS):
            both.wait()

    def sample() -> None:
        both.wait()
        results["others"] = getattr(others, way)(steps, 5, wait)

    def begin_other(step: int) -> None:
        if step == 1:
            both.wait()
        wait(step)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=sample)
        thread.start()
        results["ours"] = getattr(ours, way)(STEPS, 0, begin_other)
        thread.join(60)
    assert torch.equal(results["others"], plain)
    assert torch.equal(results["ours"], expected)
    assert summary(ours).forecast == STEPS - len(FULL)
    assert any(NOT_OURS in str(each.message) for each in caught)


# Other caches.


@pytest.fixture
def forward_of_the_class() -> Iterator[None]:
    forward = FluxTransformer2DModel.forward
    yield
    FluxTransformer2DModel.forward = forward


def caching_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """What takes the place of a class's forward, as TeaCache does."""
    raise AssertionError


def mark_model(pipe: TinyPipeline) -> None:
    pipe.transformer._is_cached = True


def mark_model_for_teacache(pipe: TinyPipeline) -> None:
    pipe.transformer.enable_teacache = True


def mark_pipeline(pipe: TinyPipeline) -> None:
    pipe._is_cached = True


def mark_class(pipe: TinyPipeline) -> None:
    # As ParaAttention does: a class of its own for the pipeline.
    pipe.__class__ = type("Cached", (TinyPipeline,), {"_is_cached": True})


def replace_forward(pipe: TinyPipeline) -> None:
    FluxTransformer2DModel.forward = caching_forward


@pytest.mark.usefixtures("forward_of_the_class")
@pytest.mark.parametrize("act", [mark_model, mark_model_for_teacache, mark_pipeline, mark_class, replace_forward])
def test_other_caches_are_refused(pipe: TinyPipeline, act: Callable[[TinyPipeline], None]) -> None:
    act(pipe)
    with pytest.raises(
        ValueError, match=r"the model must have no other cache: .*(_is_cached|enable_teacache|caching_forward)"
    ):
        enable(pipe)
    assert not hasattr(pipe.transformer, "_diffusers_hook")


@pytest.mark.usefixtures("forward_of_the_class")
@pytest.mark.parametrize("act", [mark_model, mark_model_for_teacache, mark_pipeline, replace_forward])
def test_other_caches_that_come_later_end_the_forecasts(
    pipe: TinyPipeline, act: Callable[[TinyPipeline], None]
) -> None:
    enable(pipe, Reuse(), SPARSE)
    pipe(STEPS)

    def later(index: int, latents: Tensor) -> Tensor:
        if index == 2:
            act(pipe)
        return latents

    with (
        watching(pipe.transformer) as watch,
        pytest.warns(LesaWarning, match=r"_is_cached|enable_teacache|caching_forward"),
    ):
        pipe(STEPS, on_step_end=later)
    assert watch.blocks == (2 + 7) * NUM_BLOCKS
    disable(pipe)

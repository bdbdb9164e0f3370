"""What is unexpected in a run ends the forecasts, warns once, and leaves the images right."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchHeunDiscreteScheduler
from tiny_flux import (
    CHANNELS,
    NUM_BLOCKS,
    TinyPipeline,
    call_arguments,
    watching,
)
from torch import Tensor

from lesa_kernels import LesaPredictor, Reuse, Schedule, Session, TaylorSeer
from lesa_kernels.integrations import LesaWarning, disable, enable, summary
from lesa_kernels.plan import RowRule

STEPS = 10
FULL = (0, 1, 5)
SPARSE = Schedule.explicit(STEPS, FULL)


def test_a_schedule_of_other_length_is_refused_with_full_steps(pipe: TinyPipeline) -> None:
    plain = pipe(12)
    enable(pipe, TaylorSeer(), SPARSE)
    with pytest.warns(LesaWarning, match="schedule must have 12 steps") as caught:
        assert torch.equal(pipe(12), plain)
    assert len(caught) == 1
    assert (summary(pipe).full, summary(pipe).forecast) == (12, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(STEPS)
    assert summary(pipe).refused is None


def test_a_predictor_for_other_steps_is_refused_with_full_steps(pipe: TinyPipeline) -> None:
    plain = pipe(12)
    enable(pipe, LesaPredictor(STEPS, hidden_dim=8))
    with pytest.warns(LesaWarning, match=r"num_steps \+ 1 = 11 values .* got 13"):
        assert torch.equal(pipe(12), plain)


def test_a_scheduler_that_leaves_steps_out_is_noticed(pipe: TinyPipeline) -> None:
    plain = pipe(STEPS)
    enable(pipe, Reuse(), Schedule.explicit(STEPS, range(STEPS)))
    assert torch.equal(pipe(STEPS), plain)

    def jump(index: int, latents: Tensor) -> Tensor:
        if index == 2:
            pipe.scheduler._step_index += 2
        return latents if index < 7 else torch.zeros_like(latents)

    warned = pytest.warns(LesaWarning, match="it is told .*, which is not .* step 5")
    with watching(pipe.transformer) as watch, warned, pytest.raises(IndexError):
        pipe(STEPS, on_step_end=jump)
    assert watch.blocks == 9 * NUM_BLOCKS


def test_gradients_make_all_steps_full(pipe: TinyPipeline) -> None:
    model = pipe.transformer
    enable(model, Reuse(), SPARSE, sigmas=[1 - step / STEPS for step in range(STEPS + 1)])
    latents = torch.randn(1, 6, CHANNELS, requires_grad=True)
    with pytest.warns(LesaWarning, match="gradients are enabled"):
        model(**call_arguments(latents, 0.5))
    # Warnings are errors here: there is no second one.
    for _ in range(2):
        model(**call_arguments(latents, 0.5)).sample.sum().backward()
    assert latents.grad is not None
    assert summary(model).full == 3


def test_a_loop_that_does_not_step_its_scheduler_is_noticed(pipe: TinyPipeline) -> None:
    enable(pipe)
    pipe.scheduler.set_timesteps(STEPS, mu=0.8)
    arguments = call_arguments(torch.randn(1, 6, CHANNELS), 0.5)
    with torch.no_grad():
        for _ in range(4):
            pipe.transformer(**arguments)
        with pytest.warns(LesaWarning, match=r"call 5 of step \d came; does the loop call scheduler.step"):
            pipe.transformer(**arguments)
        for _ in range(4, STEPS - 1):
            pipe.transformer(**arguments)
    assert summary(pipe).full == STEPS


def test_second_order_steps_are_refused_with_full_steps(pipe: TinyPipeline) -> None:
    model, scheduler = pipe.transformer, FlowMatchHeunDiscreteScheduler()
    enable(model, scheduler=scheduler)
    scheduler.set_timesteps(4)

    @torch.no_grad()
    def sample() -> None:
        latents = torch.randn(1, 6, CHANNELS)
        for t in scheduler.timesteps:
            latents = scheduler.step(model(**call_arguments(latents, float(t) / 1000)).sample, t, latents).prev_sample

    with (
        watching(model) as watch,
        pytest.warns(LesaWarning, match="HeunDiscreteScheduler takes steps of order 2"),
    ):
        sample()
    assert watch.blocks == len(scheduler.timesteps) * NUM_BLOCKS


def test_a_native_cache_that_comes_later_is_noticed(pipe: TinyPipeline) -> None:
    enable(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with pytest.warns(LesaWarning, match="cache of diffusers is enabled"):
        pipe(4)
    pipe.transformer.disable_cache()
    disable(pipe)
    assert not hasattr(pipe.transformer.norm_out, "_diffusers_hook")


def test_a_model_that_never_reaches_its_capture_point_is_noticed(pipe: TinyPipeline) -> None:
    plain = pipe(STEPS)
    pipe.transformer.norm_out, outer = torch.nn.Identity(), pipe.transformer.norm_out
    enable(pipe, Reuse(), SPARSE)
    pipe.transformer.norm_out = outer
    with pytest.warns(LesaWarning, match="did not reach the point"):
        assert torch.equal(pipe(STEPS), plain)


def test_the_history_is_given_back_when_forecasts_end(pipe: TinyPipeline, sessions: weakref.WeakSet[Session]) -> None:
    enable(pipe, TaylorSeer(), SPARSE)

    def end(index: int, latents: Tensor) -> Tensor:
        assert len(sessions) == (1 if index <= 3 else 0)
        if index == 3:
            pipe.transformer._is_cached = True
        return latents

    with pytest.warns(LesaWarning, match="another cache marked the FluxTransformer2DModel"):
        pipe(STEPS, on_step_end=end)


def trained(sigmas: Sequence[float]) -> LesaPredictor:
    torch.manual_seed(3)
    return LesaPredictor(len(sigmas) - 1, stages=((0.5, 1), (0.0, 2)), hidden_dim=8, trained_sigmas=sigmas)


def test_a_predictor_serves_the_sigmas_of_its_training(pipe: TinyPipeline) -> None:
    pipe(STEPS)
    enable(pipe, trained(pipe.scheduler.sigmas.tolist()), SPARSE)
    pipe(STEPS)
    assert summary(pipe).forecast == STEPS - len(FULL)


def test_sigmas_of_another_training_are_refused_or_adapted_to(pipe: TinyPipeline) -> None:
    plain = pipe(STEPS)
    sigmas = [1 - step / STEPS for step in range(STEPS + 1)]
    enable(pipe, trained(sigmas), SPARSE)
    message = r"trained for other sigmas: 0\.\d+ at step \d of 10, not 0\.\d+"
    with pytest.warns(LesaWarning, match=message + '; on_other_sigmas="adapt"') as caught:
        assert torch.equal(pipe(STEPS), plain)
    assert len(caught) == 1
    enable(pipe, trained(sigmas), SPARSE, on_other_sigmas="adapt")
    with pytest.warns(LesaWarning, match=message + "; it is used all the same") as caught:
        pipe(STEPS, true_cfg=2.0)
    assert len(caught) == 1
    assert summary(pipe).forecast == 2 * (STEPS - len(FULL))
    # For another number of steps there is nothing to adapt: its network takes so many numbers.
    with pytest.warns(LesaWarning, match=r"num_steps \+ 1 = 11 values .* got 9"):
        pipe(8)


def test_a_context_without_a_predictor_runs_in_full(pipe: TinyPipeline) -> None:
    enable(pipe, {"cond": TaylorSeer(1)}, SPARSE)
    with pytest.warns(
        LesaWarning, match=r"cache context 'uncond': there are predictors for \['cond'\] alone"
    ) as caught:
        pipe(STEPS, true_cfg=2.0)
    assert len(caught) == 1
    assert (summary(pipe).full, summary(pipe).forecast) == (len(FULL) + STEPS, STEPS - len(FULL))
    assert summary(pipe).refused is None


def test_a_predictor_for_cond_serves_a_pipeline_without_contexts(pipe: TinyPipeline) -> None:
    enable(pipe, {"cond": TaylorSeer(1)}, SPARSE)
    pipe(STEPS, true_cfg=2.0, contexts=False)
    assert summary(pipe).forecast == 2 * (STEPS - len(FULL))
    enable(pipe, {"cond": TaylorSeer(1), "uncond": Reuse()}, SPARSE)
    with pytest.warns(LesaWarning, match=r"no cache context that says which of .*'cond', 'uncond'") as caught:
        pipe(STEPS, true_cfg=2.0, contexts=False)
    assert len(caught) == 1
    assert summary(pipe).full == 2 * STEPS


class FaultyRows(Reuse):
    def rows(self, sigmas: Sequence[float]) -> RowRule:
        raise AttributeError("no such thing")


class FaultyObjection(Reuse):
    def incompatibility(self, sigmas: Sequence[float]) -> str | None:
        raise AttributeError("no such thing")


@pytest.mark.parametrize("faulty", [FaultyRows, FaultyObjection])
def test_a_fault_of_a_predictor_costs_no_image(pipe: TinyPipeline, faulty: type[Reuse]) -> None:
    plain = pipe(STEPS)
    enable(pipe, faulty(), SPARSE)
    with pytest.warns(LesaWarning, match=r"AttributeError\('no such thing'\)"):
        assert torch.equal(pipe(STEPS), plain)


def test_a_scheduler_without_steps_costs_no_call(pipe: TinyPipeline) -> None:
    enable(pipe)
    pipe.scheduler.sigmas = None
    with torch.no_grad(), pytest.warns(LesaWarning, match="noise levels cannot be read"):
        pipe.transformer(**call_arguments(torch.randn(1, 6, CHANNELS), 0.5))
    assert summary(pipe).full == 1

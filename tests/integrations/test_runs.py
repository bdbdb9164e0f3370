"""Runs: steps, sigmas, cache contexts, what a forecast is made of, and what is kept from one run to the next."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from tiny_flux import (
    CHANNELS,
    NUM_BLOCKS,
    WIDTH,
    TinyPipeline,
    call_arguments,
    tiny_pipeline,
    tiny_transformer,
    watching,
)
from torch import Tensor

from lesa_kernels import LesaPredictor, Plan, Reuse, Schedule, Session, TaylorSeer
from lesa_kernels.integrations import LesaWarning, disable, enable, enabled, recorded, summary
from lesa_kernels.integrations.models import flux_tail
from lesa_kernels.schedule import ScheduleRule

STEPS = 10
FULL = (0, 1, 5)
SPARSE = Schedule.explicit(STEPS, FULL)


def test_reuse_hands_out_the_captured_feature(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), SPARSE)
    with watching(pipe.transformer) as watch:
        pipe(STEPS)
    for step, feature in enumerate(watch.features):
        assert torch.equal(feature, watch.features[max(full for full in FULL if full <= step)])
    assert not torch.equal(watch.features[1], watch.features[0])


def test_a_forecast_is_the_formula_applied_to_the_captured_features(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(order=1, variable="sigma"), SPARSE)
    with watching(pipe.transformer) as watch:
        pipe(STEPS)
    t, h = pipe.scheduler.sigmas.double(), [feature.double() for feature in watch.features]
    for step in range(2, STEPS):
        old, new = (0, 1) if step < 5 else (1, 5)
        if step == 5:
            continue
        slope = (h[new] - h[old]) / (t[new] - t[old])
        torch.testing.assert_close(h[step], h[new] + (t[step] - t[new]) * slope, rtol=1e-5, atol=1e-5)


def test_a_trained_predictor_gets_the_sigmas_of_the_scheduler(pipe: TinyPipeline) -> None:
    predictor = LesaPredictor(STEPS, stages=((0.5, 2), (0.0, 3)), hidden_dim=8)
    enable(pipe, predictor, Schedule.explicit(STEPS, [0, 1, 2, 6]))
    with watching(pipe.transformer) as watch:
        pipe(STEPS)
    sigmas = pipe.scheduler.sigmas.tolist()
    with torch.no_grad():
        for step in (3, 4, 5, 7, 8, 9):
            expected = predictor(watch.features[:step], sigmas, sigmas[step])
            torch.testing.assert_close(watch.features[step], expected, rtol=1e-4, atol=1e-4)


# torch's own remark on normalizing under autocast.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_tail_repeats_the_full_forward_bit_for_bit(precision: str, return_dict: bool) -> None:
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = tiny_transformer().to(dtype)
    arguments = call_arguments(torch.randn(2, 6, CHANNELS, dtype=dtype), 0.734) | {"return_dict": return_dict}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        with watching(model) as watch:
            full = model(**arguments)
        tail = flux_tail(model, watch.features[0], **arguments)
    assert type(tail) is type(full)
    assert torch.equal(tail[0], full[0])


def test_attention_arguments_pass_and_stay_as_they_were(pipe: TinyPipeline) -> None:
    attention = {"scale": 1.0, "ip_hidden_states": None}
    scheduler = pipe.scheduler
    scheduler.set_timesteps(2, mu=0.8)
    with enabled(pipe, Reuse(), Schedule.explicit(2, [0])), torch.no_grad(), watching(pipe.transformer) as watch:
        for t in scheduler.timesteps:
            latents = torch.randn(1, 6, CHANNELS)
            arguments = call_arguments(latents, float(t) / 1000)
            residuals = [torch.randn(1, 6, 32)]
            output = pipe.transformer(
                **arguments, joint_attention_kwargs=attention, controlnet_block_samples=residuals
            ).sample
            scheduler.step(output, t, latents)
    assert watch.blocks == NUM_BLOCKS
    assert attention == {"scale": 1.0, "ip_hidden_states": None}


def test_no_two_runs_share_anything(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    first, other = pipe(STEPS, seed=1), pipe(STEPS, seed=2)
    assert torch.equal(pipe(STEPS, seed=1), first)
    assert not torch.equal(first, other)


def test_batch_sizes_and_image_sizes_change_between_runs(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    single = pipe(STEPS)
    for batch, tokens in ((2, 6), (1, 9), (3, 1)):
        assert pipe(STEPS, batch=batch, tokens=tokens).shape == (batch, tokens, CHANNELS)
        assert summary(pipe).forecast == STEPS - 3
    assert torch.equal(pipe(STEPS), single)


def test_step_counts_change_between_runs_under_a_rule(pipe: TinyPipeline) -> None:
    enable(pipe)
    for steps in (4, 20, 1):
        pipe(steps)
        assert summary(pipe).steps == steps
        assert summary(pipe).refused is None


def test_an_exception_does_not_reach_the_next_run(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    fresh = pipe(STEPS)

    def fail(index: int, latents: Tensor) -> Tensor:
        if index == 6:
            raise KeyboardInterrupt
        return latents

    with pytest.raises(KeyboardInterrupt):
        pipe(STEPS, seed=3, on_step_end=fail)
    assert torch.equal(pipe(STEPS), fresh)


def test_an_exception_inside_the_model_does_not_reach_the_next_run(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    fresh = pipe(STEPS)
    handle = pipe.transformer.proj_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipe(STEPS, seed=3)
    handle.remove()
    assert torch.equal(pipe(STEPS), fresh)


def test_an_exception_inside_a_counted_model_does_not_reach_the_next_run(pipe: TinyPipeline) -> None:
    pipe(STEPS)
    sigmas = pipe.scheduler.sigmas
    enable(pipe.transformer, TaylorSeer(), SPARSE, sigmas=sigmas)
    fresh = pipe(STEPS)

    calls = iter(range(6))

    def fail_at_six(*_: object) -> None:
        if next(calls) == 5:
            raise KeyboardInterrupt

    handle = pipe.transformer.proj_out.register_forward_hook(fail_at_six)
    with pytest.raises(KeyboardInterrupt):
        pipe(STEPS, seed=3)
    handle.remove()
    assert torch.equal(pipe(STEPS), fresh)


def test_an_aborted_late_start_does_not_reach_a_run_that_starts_one_step_later(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    expected = pipe(STEPS, begin=5)

    def fail(index: int, latents: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(STEPS, begin=4, seed=3, on_step_end=fail)
    assert torch.equal(pipe(STEPS, begin=5), expected)


@pytest.mark.parametrize("contexts", [True, False])
def test_the_calls_of_guidance_are_independent(pipe: TinyPipeline, contexts: bool) -> None:
    enable(pipe, Reuse(), SPARSE)
    with watching(pipe.transformer) as watch:
        pipe(STEPS, true_cfg=3.0, contexts=contexts)
    assert watch.blocks == 2 * len(FULL) * NUM_BLOCKS
    for branch in (0, 1):
        features = watch.features[branch::2]
        for step, feature in enumerate(features):
            assert torch.equal(feature, features[max(full for full in FULL if full <= step)])
    assert not torch.equal(watch.features[0], watch.features[1])
    assert (summary(pipe).full, summary(pipe).forecast) == (6, 14)


def test_guidance_may_start_in_the_middle(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), SPARSE)
    with watching(pipe.transformer) as watch:
        pipe(STEPS, true_cfg=3.0, cfg_from=3)
    # The late branch runs in full at steps 3 and 5.
    assert watch.blocks == (len(FULL) + 2) * NUM_BLOCKS
    assert summary(pipe).refused is None


def test_image_to_image_starts_late(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    with watching(pipe.transformer) as watch:
        pipe(STEPS, begin=3)
    assert watch.blocks == 2 * NUM_BLOCKS
    assert torch.equal(watch.features[1], watch.features[0])
    assert (summary(pipe).full, summary(pipe).forecast) == (2, 5)
    assert "full steps: 3 5" in summary(pipe).plan


@pytest.mark.parametrize("named", [True, False])
def test_a_bare_transformer_counts_its_calls(named: bool) -> None:
    pipe = tiny_pipeline()
    enable(pipe, TaylorSeer(), SPARSE)
    expected = pipe(STEPS)
    sigmas = pipe.scheduler.sigmas
    disable(pipe)
    enable(pipe.transformer, TaylorSeer(), SPARSE, sigmas=sigmas)
    for _ in range(2):
        assert torch.equal(pipe(STEPS, contexts=named), expected)
    assert summary(pipe.transformer).forecast == STEPS - len(FULL)


def test_a_bare_transformer_follows_a_scheduler(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    expected = pipe(STEPS)
    enable(pipe.transformer, TaylorSeer(), SPARSE, scheduler=pipe.scheduler)
    assert torch.equal(pipe(STEPS), expected)


def test_a_cache_context_may_hold_the_step() -> None:
    model, sigmas = tiny_transformer(), [1 - step / STEPS for step in range(STEPS + 1)]
    enable(model, TaylorSeer(), SPARSE, sigmas=sigmas)
    latents = [torch.randn(1, 6, CHANNELS) for _ in range(STEPS)]
    others = [torch.randn(1, 6, CHANNELS) for _ in range(STEPS)]

    def run(steps: int, latents: list[Tensor]) -> list[Tensor]:
        outputs = []
        for step in range(steps):
            with model.cache_context("cond", step_index=step, sigma=sigmas[step], num_inference_steps=STEPS):
                outputs.append(model(**call_arguments(latents[step], sigmas[step])).sample)
        return outputs

    with torch.no_grad():
        whole = run(STEPS, latents)
        for broken_off_after in (1, 4):
            run(broken_off_after, others)
            with watching(model) as watch:
                again = run(STEPS, latents)
            assert all(map(torch.equal, whole, again))
            assert watch.blocks == len(FULL) * NUM_BLOCKS
        with (
            model.cache_context("cond", step_index=0, sigma=0.5),
            pytest.warns(LesaWarning, match=r"says sigma 0.5 at step 0, the sigmas say 1.0"),
        ):
            model(**call_arguments(latents[0], 0.5))
        run(1, latents)
        with (
            model.cache_context("cond", step_index=0, num_inference_steps=9),
            pytest.warns(LesaWarning, match="counts 9 steps, the sigmas 10"),
        ):
            model(**call_arguments(latents[0], 0.5))


def test_a_replaced_scheduler_counts(pipe: TinyPipeline) -> None:
    enable(pipe)
    pipe(STEPS)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe(20)
    assert (summary(pipe).steps, summary(pipe).full) == (20, 4)


class CountingReuse(Reuse):
    def __init__(self) -> None:
        self.plans = 0

    def plan(
        self,
        sigmas: Sequence[float],
        schedule: Schedule | ScheduleRule,
        **options: Any,
    ) -> Plan:
        self.plans += 1
        return super().plan(sigmas, schedule, **options)


def test_plans_are_made_once_for_the_same_sigmas(pipe: TinyPipeline) -> None:
    predictor = CountingReuse()
    enable(pipe, predictor)
    for steps in (STEPS, STEPS, 12, STEPS):
        pipe(steps, true_cfg=2.0)
    assert predictor.plans == 2


def test_the_history_is_given_back_after_the_last_step(pipe: TinyPipeline, sessions: weakref.WeakSet[Session]) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    alive: list[int] = []

    def count(index: int, latents: Tensor) -> Tensor:
        alive.append(len(sessions))
        return latents

    pipe(STEPS, true_cfg=2.0, on_step_end=count)
    assert alive == [2] * (STEPS - 1) + [0]
    # Two contexts, each with room for the forecasts of steps 6 to 9 and what they are made of.
    assert summary(pipe).history_bytes >= 2 * 5 * 6 * WIDTH * 4


def test_inference_mode_and_no_grad_take_turns(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    expected = pipe(STEPS)
    with torch.inference_mode():
        assert torch.equal(pipe(STEPS), expected)
    assert torch.equal(pipe(STEPS), expected)


def test_features_can_be_recorded(pipe: TinyPipeline) -> None:
    for accelerate in (False, True):
        with recorded(pipe) as features, watching(pipe.transformer) as watch:
            pipe(STEPS)
        assert len(features) == STEPS
        assert all(map(torch.equal, features, watch.features))
        if not accelerate:
            enable(pipe, Reuse(), SPARSE)


def test_sigmas_are_read_on_the_host_once_a_run(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    reads: list[int] = []
    original = torch.Tensor.tolist

    class Sigmas(torch.Tensor):
        def tolist(self) -> list[float]:
            reads.append(1)
            return original(self)

    set_timesteps = pipe.scheduler.set_timesteps

    def counted(*args: object, **kwargs: object) -> None:
        set_timesteps(*args, **kwargs)
        pipe.scheduler.sigmas = pipe.scheduler.sigmas.as_subclass(Sigmas)

    pipe.scheduler.set_timesteps = counted
    pipe(STEPS)
    assert len(reads) == 1
    assert summary(pipe).forecast == STEPS - len(FULL)


def test_calls_are_counted_from_where_a_pipeline_starts() -> None:
    """Schedulers without a step index: a pipeline that starts late says how many steps are left."""
    pipe, scheduler = tiny_pipeline(), DDIMScheduler()
    pipe.scheduler = scheduler
    enable(pipe, Reuse(), Schedule.explicit(STEPS, FULL))
    scheduler.set_timesteps(STEPS)
    pipe._num_timesteps = STEPS - 4
    with torch.no_grad(), watching(pipe.transformer) as watch:
        for t in scheduler.timesteps[4:]:
            pipe.transformer(**call_arguments(torch.randn(1, 6, CHANNELS), float(t) / 1000))
    assert watch.blocks == 2 * NUM_BLOCKS
    assert "full steps: 4 5" in summary(pipe).plan


def test_contexts_of_a_pipeline_that_starts_late_are_counted_alike() -> None:
    pipe, scheduler = tiny_pipeline(), DDIMScheduler()
    pipe.scheduler = scheduler
    enable(pipe, Reuse(), Schedule.explicit(STEPS, FULL))
    scheduler.set_timesteps(STEPS)
    pipe._num_timesteps = STEPS - 4
    with torch.no_grad():
        for t in scheduler.timesteps[4:]:
            for name in ("cond", "uncond"):
                with pipe.transformer.cache_context(name):
                    pipe.transformer(**call_arguments(torch.randn(1, 6, CHANNELS), float(t) / 1000))
    assert summary(pipe).refused is None
    assert (summary(pipe).full, summary(pipe).forecast) == (2 * 2, 2 * 4)


def test_a_context_that_joins_late_is_counted_from_there() -> None:
    model, sigmas = tiny_transformer(), [1 - step / STEPS for step in range(STEPS + 1)]
    enable(model, Reuse(), SPARSE, sigmas=sigmas)
    with torch.no_grad(), watching(model) as watch:
        for step in range(STEPS):
            for name in ("cond", "uncond")[: 1 + (step >= 3)]:
                with model.cache_context(name):
                    model(**call_arguments(torch.randn(1, 6, CHANNELS), sigmas[step]))
    # The late one runs in full at steps 3 and 5.
    assert watch.blocks == (len(FULL) + 2) * NUM_BLOCKS
    assert summary(model).refused is None

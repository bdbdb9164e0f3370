"""Runs: steps, sigmas, cache contexts, what a forecast is made of, and what happens when something is unexpected."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from tiny_flux import (
    CHANNELS,
    NUM_BLOCKS,
    TinyPipeline,
    call_arguments,
    tiny_pipeline,
    tiny_transformer,
    watching,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lesa_kernels import LesaPredictor, Plan, Reuse, Schedule, Session, TaylorSeer
from lesa_kernels.integrations import LesaWarning, disable, enable, enabled, recorded, runs, summary
from lesa_kernels.integrations.flux import flux_tail
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
    sigmas = [1 - step / STEPS for step in range(STEPS + 1)]
    enable(pipe.transformer, TaylorSeer(), SPARSE, sigmas=sigmas)
    fresh = pipe(STEPS)

    def fail_at_six(index: int, latents: Tensor) -> Tensor:
        return latents if index < 5 else latents.reshape(-1)

    with pytest.raises(ValueError, match="unpack"):
        pipe(STEPS, seed=3, on_step_end=fail_at_six)
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


def test_a_cache_context_may_tell_the_step() -> None:
    model, sigmas = tiny_transformer(), [1 - step / STEPS for step in range(STEPS + 1)]
    enable(model, Reuse(), SPARSE, sigmas=sigmas)
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
        *,
        first_step: int = 0,
        chunk: int | None = None,
    ) -> Plan:
        self.plans += 1
        return super().plan(sigmas, schedule, first_step=first_step, chunk=chunk)


def test_plans_are_made_once_for_the_same_sigmas(pipe: TinyPipeline) -> None:
    predictor = CountingReuse()
    enable(pipe, predictor)
    for steps in (STEPS, STEPS, 12, STEPS):
        pipe(steps, true_cfg=2.0)
    assert predictor.plans == 2


def test_the_history_is_given_back_after_the_last_step(pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    class Registered(Session):
        def __init__(self, plan: Plan) -> None:
            super().__init__(plan)
            sessions.add(self)

    monkeypatch.setattr(runs, "Session", Registered)
    enable(pipe, TaylorSeer(), SPARSE)
    alive: list[int] = []

    def count(index: int, latents: Tensor) -> Tensor:
        alive.append(len(sessions))
        return latents

    pipe(STEPS, true_cfg=2.0, on_step_end=count)
    assert alive == [2] * (STEPS - 1) + [0]
    assert summary(pipe).history_bytes > 0


def test_inference_mode_and_no_grad_take_turns(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    expected = pipe(STEPS)
    with torch.inference_mode():
        assert torch.equal(pipe(STEPS), expected)
    assert torch.equal(pipe(STEPS), expected)


def test_latents_that_change_in_a_run_end_the_forecasts(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    seen: list[tuple[Tensor, Tensor]] = []

    def cut(index: int, latents: Tensor) -> Tensor:
        return latents[:, :4] if index == 3 else latents

    def keep(_: object, __: object, arguments: dict[str, Tensor], output: tuple[Tensor]) -> None:
        seen.append((arguments["hidden_states"], output[0]))

    handle = pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    with pytest.warns(LesaWarning, match=r"latents changed from .*6, 4.* to .*4, 4") as caught:
        pipe(STEPS, on_step_end=cut)
    handle.remove()
    assert len(caught) == 1
    assert summary(pipe).full == 2 + (STEPS - 4)
    sigmas = pipe.scheduler.timesteps / 1000
    disable(pipe)
    with torch.no_grad():
        for step in range(4, STEPS):
            latents, output = seen[step]
            assert torch.equal(pipe.transformer(**call_arguments(latents, float(sigmas[step]))).sample, output)


def test_a_change_of_dtype_ends_the_forecasts(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)

    def convert(index: int, latents: Tensor) -> Tensor:
        if index == 3:
            pipe.transformer.to(torch.bfloat16)
        return latents.to(torch.bfloat16) if index >= 3 else latents

    with pytest.warns(LesaWarning, match="float32.* to .*bfloat16"):
        pipe(STEPS, on_step_end=convert)


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


def test_a_step_out_of_order_ends_the_forecasts(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), SPARSE)

    def jump(index: int, latents: Tensor) -> Tensor:
        if index == 2:
            pipe.scheduler._step_index += 2
        return latents

    def stop(index: int, latents: Tensor) -> Tensor:
        if index == 6:
            raise KeyboardInterrupt
        return jump(index, latents)

    with pytest.warns(LesaWarning, match="step 5 came where step 3 was due"), pytest.raises(KeyboardInterrupt):
        pipe(STEPS, on_step_end=stop)
    assert (summary(pipe).full, summary(pipe).forecast) == (2 + 4, 1)


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
        with pytest.warns(LesaWarning, match=r"call 5 of step 0 came; does the loop call scheduler.step"):
            pipe.transformer(**arguments)
        for _ in range(4, STEPS - 1):
            pipe.transformer(**arguments)
    assert summary(pipe).full == STEPS


def test_sigmas_that_repeat_are_refused_with_full_steps(pipe: TinyPipeline) -> None:
    model, scheduler = pipe.transformer, FlowMatchHeunDiscreteScheduler()
    enable(model, scheduler=scheduler)
    scheduler.set_timesteps(4)

    @torch.no_grad()
    def sample() -> None:
        latents = torch.randn(1, 6, CHANNELS)
        for t in scheduler.timesteps:
            latents = scheduler.step(model(**call_arguments(latents, float(t) / 1000)).sample, t, latents).prev_sample

    with watching(model) as watch, pytest.warns(LesaWarning, match="sigmas repeat"):
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


def test_compiled_blocks_keep_whole_graphs(pipe: TinyPipeline) -> None:
    """Regional compilation: the hooks break no graph of a block and add no recompilation."""
    enable(pipe, TaylorSeer(), SPARSE)
    expected = pipe(STEPS)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(pipe(STEPS), expected)
    first = len(graphs)
    pipe(STEPS)
    assert first == len(graphs)
    # One graph for each kind of block.
    assert first == 2
    with watching(pipe.transformer) as watch:
        pipe(STEPS)
    assert watch.blocks == len(FULL) * NUM_BLOCKS


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_compiled_once_for_each_kind_of_step(pipe: TinyPipeline, in_place: bool) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    expected = pipe(STEPS)
    torch._dynamo.reset()
    counter = CompileCounter()
    if in_place:
        pipe.transformer.compile(backend=counter)
    else:
        disable(pipe)
        pipe.transformer = torch.compile(pipe.transformer, backend=counter)
        enable(pipe, TaylorSeer(), SPARSE)
    torch.testing.assert_close(pipe(STEPS), expected)
    frames = counter.frame_count
    assert frames > 0
    pipe(STEPS, seed=1)
    assert counter.frame_count == frames
    assert (summary(pipe).full, summary(pipe).forecast) == (len(FULL), STEPS - len(FULL))


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

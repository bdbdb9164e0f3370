"""`enable`, `disable`, `enabled`, `summary`: what they take, what they refuse, what they leave behind."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig, FlowMatchEulerDiscreteScheduler
from tiny_flux import NUM_BLOCKS, TinyPipeline, call_arguments, tiny_transformer, watching
from torch import nn

from lesa_kernels import LesaPredictor, Reuse, Schedule, TaylorSeer
from lesa_kernels.integrations import (
    Adapter,
    default_schedule,
    disable,
    enable,
    enabled,
    register_adapter,
    summary,
)

STEPS = 10
THREE = Schedule.explicit(STEPS, [0, 1, 5])


def test_all_full_steps_give_the_bits_of_the_plain_run(pipe: TinyPipeline) -> None:
    plain = pipe(STEPS)
    enable(pipe, Reuse(), Schedule.explicit(STEPS, range(STEPS)))
    assert torch.equal(pipe(STEPS), plain)
    assert summary(pipe).forecast == 0


def test_blocks_run_on_the_full_steps_of_the_plan_alone(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), THREE)
    with watching(pipe.transformer) as watch:
        pipe(STEPS)
    assert watch.blocks == 3 * NUM_BLOCKS
    assert len(watch.features) == STEPS
    found = summary(pipe)
    assert (found.steps, found.full, found.forecast, found.refused) == (STEPS, 3, 7, None)
    assert "full steps: 0 1 5" in found.plan


@pytest.mark.parametrize(("steps", "full"), [(1, 1), (2, 2), (4, 3), (10, 3), (16, 4), (50, 10)])
def test_the_default_schedule_takes_a_fifth_of_the_steps(steps: int, full: int) -> None:
    assert len(default_schedule([1 - step / steps for step in range(steps + 1)]).full_steps) == full


def test_a_predictor_brings_the_schedule_that_it_was_made_for(pipe: TinyPipeline) -> None:
    predictor = LesaPredictor(STEPS, stages=((0.0, 1),), hidden_dim=8)
    predictor.trained_schedule = THREE
    enable(pipe, predictor)
    pipe(STEPS)
    assert "full steps: 0 1 5" in summary(pipe).plan
    enable(pipe, {"cond": predictor}, Schedule.explicit(STEPS, [0, 2]))
    pipe(STEPS)
    assert "full steps: 0 2" in summary(pipe).plan


@pytest.mark.parametrize(("steps", "full"), [(4, (0, 2, 3)), (8, (0, 5, 7))])
def test_few_step_models_skip_blocks_by_default(pipe: TinyPipeline, steps: int, full: tuple[int, ...]) -> None:
    """Of all choices of three full steps these came closest to all of them on the demo's model (`make demo`)."""
    enable(pipe)
    with watching(pipe.transformer) as watch:
        pipe(steps)
    assert watch.blocks == len(full) * NUM_BLOCKS
    assert "full steps: " + " ".join(map(str, full)) in summary(pipe).plan


def test_defaults_need_nothing_but_the_pipeline(pipe: TinyPipeline) -> None:
    plain = pipe(20)
    enable(pipe)
    assert not torch.equal(pipe(20), plain)
    assert (summary(pipe).full, summary(pipe).forecast) == (4, 16)


def test_disable_leaves_no_trace(pipe: TinyPipeline) -> None:
    model = pipe.transformer
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    enable(pipe, Reuse(), THREE)
    assert model._diffusers_hook.hooks
    assert model.norm_out._forward_pre_hooks
    disable(pipe)
    after = {name: dict(vars(module)) for name, module in model.named_modules()}
    assert after.keys() == before.keys()
    assert all(after[name].keys() == before[name].keys() for name in before)
    plain = pipe(STEPS)
    enable(pipe, Reuse(), THREE)
    assert not torch.equal(pipe(STEPS), plain)
    disable(model)
    assert torch.equal(pipe(STEPS), plain)
    assert not model._diffusers_hook.hooks


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, pickle.dumps, lambda target: torch.save(target, io.BytesIO())],
    ids=["deepcopy", "pickle", "torch.save"],
)
@pytest.mark.parametrize("bare", [True, False])
def test_an_enabled_model_refuses_copies_and_pickles(
    pipe: TinyPipeline, copied: Callable[[Any], object], bare: bool
) -> None:
    target = pipe.transformer if bare else pipe
    enable(pipe, Reuse(), THREE)
    expected = pipe(STEPS)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled; call lesa.disable\(...\) first"):
        copied(target)
    assert torch.equal(pipe(STEPS), expected)
    disable(pipe)
    copied(target)


def test_an_enabled_pipeline_can_be_saved(pipe: TinyPipeline, tmp_path: Path) -> None:
    plain = pipe(STEPS)
    enable(pipe, Reuse(), THREE)
    pipe(STEPS)
    pipe.save_pretrained(tmp_path)
    assert summary(pipe).forecast > 0
    loaded = TinyPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(loaded(STEPS), plain)


def test_a_copy_of_a_disabled_model_is_its_own(pipe: TinyPipeline) -> None:
    enable(pipe)
    disable(pipe)
    other = copy.deepcopy(pipe.transformer)
    nn.init.zeros_(other.proj_out.weight)
    with torch.no_grad():
        output = other(**call_arguments(torch.randn(1, 6, 4), 0.5)).sample
    assert torch.equal(output, other.proj_out.bias.expand_as(output))


def test_disable_where_nothing_is_enabled_does_nothing(pipe: TinyPipeline) -> None:
    disable(pipe)
    assert not hasattr(pipe.transformer, "_diffusers_hook")


def test_foreign_hooks_survive_disable(pipe: TinyPipeline) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    cast = pipe(STEPS)
    with enabled(pipe, Reuse(), THREE):
        pipe(STEPS)
    assert torch.equal(pipe(STEPS), cast)
    assert pipe.transformer.transformer_blocks[0].attn.to_q._diffusers_hook.hooks


@pytest.mark.parametrize("offload_first", [True, False])
def test_model_offload_and_hooks_come_and_go_in_any_order(pipe: TinyPipeline, offload_first: bool) -> None:
    plain = pipe(STEPS)
    with enabled(pipe, Reuse(), THREE):
        reused = pipe(STEPS)
    steps = [lambda: pipe.enable_model_cpu_offload(device="cpu"), lambda: enable(pipe, Reuse(), THREE)]
    for step in steps if offload_first else reversed(steps):
        step()
    # A pipeline takes its offload hooks off and puts them on again at the end of each call.
    for _ in range(2):
        assert torch.equal(pipe(STEPS), reused)
    assert hasattr(pipe.transformer, "_hf_hook")
    disable(pipe)
    for _ in range(2):
        assert torch.equal(pipe(STEPS), plain)
    assert hasattr(pipe.transformer, "_hf_hook")
    enable(pipe, Reuse(), THREE)
    pipe.remove_all_hooks()
    assert torch.equal(pipe(STEPS), reused)
    disable(pipe)
    assert torch.equal(pipe(STEPS), plain)


def test_enable_again_replaces(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(), Schedule.explicit(STEPS, range(STEPS)))
    enable(pipe, Reuse(), THREE)
    with watching(pipe.transformer) as watch:
        pipe(STEPS)
    assert watch.blocks == 3 * NUM_BLOCKS


def test_enabled_restores_what_was_before(pipe: TinyPipeline) -> None:
    plain = pipe(STEPS)
    with enabled(pipe, Reuse(), THREE):
        reused = pipe(STEPS)
    assert torch.equal(pipe(STEPS), plain)
    enable(pipe, Reuse(), THREE)
    with enabled(pipe, Reuse(), Schedule.explicit(STEPS, range(STEPS))):
        assert torch.equal(pipe(STEPS), plain)
    assert torch.equal(pipe(STEPS), reused)


def test_enabled_cleans_up_after_an_exception(pipe: TinyPipeline) -> None:
    def fail() -> None:
        with enabled(pipe):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not hasattr(pipe.transformer, "_diffusers_hook")


def test_a_refused_enable_changes_nothing(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), THREE)
    first = pipe(STEPS)
    with pytest.raises(TypeError, match="predictor must be a Predictor, a mapping of them or None, got str"):
        enable(pipe, "taylor")  # type: ignore[arg-type]
    assert torch.equal(pipe(STEPS), first)


def test_a_native_cache_is_refused(pipe: TinyPipeline) -> None:
    pipe.transformer.enable_cache(FasterCacheConfig(current_timestep_callback=lambda: 0))
    with pytest.raises(ValueError, match="no other cache: a cache of diffusers is enabled"):
        enable(pipe)
    pipe.transformer.disable_cache()
    enable(pipe)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one of a pipeline, scheduler= and sigmas=.* got none"),
        ({"scheduler": object()}, ValueError, "must have sigmas and a step_index, or timesteps, got object"),
        ({"sigmas": [1.0]}, ValueError, "S\\+1 >= 2 falling numbers"),
        (
            {"sigmas": [1.0, 0.0], "scheduler": FlowMatchEulerDiscreteScheduler()},
            ValueError,
            "got scheduler and sigmas",
        ),
        ({"sigmas": [1.0, 0.0], "predictor": {}}, ValueError, "at least one entry, got none"),
        ({"sigmas": [1.0, 0.0], "predictor": {"cond": 5}}, TypeError, "names of .* to Predictors, got 'cond': int"),
        ({"sigmas": [1.0, 0.0], "schedule": 5}, TypeError, "schedule must be a Schedule, a rule or None, got int"),
    ],
)
def test_a_bare_transformer_needs_steps_from_one_argument(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        enable(tiny_transformer(), **arguments)


def test_a_pipeline_has_its_own_steps(pipe: TinyPipeline) -> None:
    with pytest.raises(ValueError, match="got pipeline and sigmas"):
        enable(pipe, sigmas=[1.0, 0.0])


def test_targets_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(TypeError, match=r"target must be a pipeline .* got str"):
        enable("flux")
    with pytest.raises(ValueError, match=r"no adapter for Linear; .*FluxTransformer2DModel"):
        enable(nn.Linear(1, 1), sigmas=[1.0, 0.0])


def test_summary_needs_a_run(pipe: TinyPipeline) -> None:
    with pytest.raises(ValueError, match="must be enabled"):
        summary(pipe)
    enable(pipe)
    with pytest.raises(ValueError, match="must have run"):
        summary(pipe)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x)) + shift


def test_users_register_their_own_models() -> None:
    register_adapter(
        Adapter(
            "TwoLayers",
            capture="head",
            tail=lambda model, feature, *, x, shift: model.head(feature) + shift,
            timestep="shift",
        )
    )
    model = TwoLayers()
    enable(model, Reuse(), Schedule.explicit(2, [0]), sigmas=[1.0, 0.5, 0.0])
    x, high, low = torch.randn(3, 2), torch.ones(3, 2), torch.full((3, 2), 0.5)
    with torch.no_grad():
        first = model(x, high)
        # Another input does not matter on a forecast step; what the tail reads does, by position or by name.
        torch.testing.assert_close(model(torch.randn(3, 2), low), first - 0.5)
        assert torch.equal(model(x, shift=high), first)
        torch.testing.assert_close(model(x=torch.randn(3, 2), shift=low), first - 0.5)

"""Errors for pipelines that cannot be a source, and for policies that answer with something else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny_flux import tiny_pipeline
from torch import Tensor

pytest.importorskip("transformers", reason="diffusers' pipelines import transformers")

import diffusers
from tiny_sources import (
    Strange,
    embeddings,
    flux_case,
    in_full,
    odd_pipeline,
    wan22_case,
    wan_case,
)

from lesa_kernels.integrations import PipelineSource, disable, enable
from lesa_kernels.integrations.cache_hooks import find_hook
from lesa_kernels.trajectories import StepPolicy

FLUX_PROMPTS = embeddings(pooled=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loops": 2}, "a second denoising loop began within one call"),
        ({"loops": 0}, "did not call its transformer"),
        ({"extra_steps": 1}, "must have 3 steps as asked for, it has 4"),
    ],
)
def test_what_is_no_single_run_is_refused(settings: dict[str, Any], message: str) -> None:
    pipe = odd_pipeline()
    with pytest.raises(ValueError, match=message):
        PipelineSource(pipe, ["one"], steps=3, **settings).run([0], in_full)
    assert find_hook(pipe.transformer) is None


def test_all_runs_have_the_same_sigmas() -> None:
    case = flux_case()
    source = case.source()
    assert source.sigmas
    case.pipe.scheduler.register_to_config(max_shift=2.0, base_shift=0.9)
    with pytest.raises(ValueError, match="all runs must have the same sigmas"):
        source.run([0], in_full)


def test_a_second_order_scheduler_is_refused() -> None:
    case = wan_case()
    case.pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="cannot be run: FlowMatchHeunDiscreteScheduler takes steps of order 2"):
        case.run([0], in_full)


def test_an_interrupted_run_is_an_error() -> None:
    case = flux_case()
    source = case.source(callback_on_step_end=lambda pipe, i, t, found: setattr(pipe, "_interrupt", i == 2) or found)
    with pytest.raises(ValueError, match="must call its transformer up to step 5, its last call was in step 2"):
        source.run([0], in_full)


def test_a_model_that_is_more_than_its_capture_point_is_refused() -> None:
    pipe = odd_pipeline()
    pipe.transformer = Strange()
    with pytest.raises(ValueError, match=r"must return one tensor, or a list .* Strange returns something else"):
        PipelineSource(pipe, ["one"], steps=2).run([0], in_full)

    class Two(Strange):
        def forward(self, hidden_states: Tensor, **_: Any) -> Any:
            before = hidden_states
            for block in self.blocks:
                hidden_states = block(hidden_states)
            return (self.norm_out(hidden_states) + (hidden_states - before).mean(),)

    pipe.transformer = Two()
    with pytest.raises(ValueError, match=r"Two, given the feature captured at 'norm_out' .* gives another output"):
        PipelineSource(pipe, ["one"], steps=2).run([0], in_full)
    assert find_hook(pipe.transformer) is None


@pytest.mark.parametrize(
    ("policy", "error", "message"),
    [
        (lambda call: None, TypeError, "must answer with an output of the model, got none at step 0"),
        (lambda call: call.blocks() and None, RuntimeError, "Boolean value"),
        (lambda call: call.blocks(), ValueError, r"an output of shape \(1, 16, 4\), got \(1, 16, 32\) at step 0"),
        (lambda call: [call.blocks(), call.blocks()], RuntimeError, "blocks must be called at most once"),
    ],
)
def test_what_a_policy_does_wrong_is_an_error(policy: StepPolicy, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        flux_case().source().run([0], policy)


def test_an_answer_without_the_model_has_the_shape_of_its_outputs() -> None:
    source = flux_case().source()
    with pytest.raises(ValueError, match="must call blocks before its first answer without the model, it did not by"):
        source.run([0], lambda call: torch.zeros(1, 16, 4))
    source.run([0], in_full)
    for shape, expected in (((1, 16, 4), (2, 16, 4)), ((2, 16, 5), (2, 16, 4))):
        with pytest.raises(ValueError, match=re.escape(f"an output of shape {expected}, got {shape} at step 0")):
            source.run([0, 1], lambda call, shape=shape: torch.zeros(shape))  # type: ignore[misc]


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "message"),
    [
        ([], {}, ValueError, "prompts must hold at least one prompt, got none"),
        ("a cat", {}, TypeError, "prompts must be a sequence of prompts, got str"),
        ([{"prompt": "a"}, "b", {"class_label": 1}], {}, ValueError, r"prompts\[2\] must have the arguments"),
        (FLUX_PROMPTS, {"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        (FLUX_PROMPTS, {"generator": None}, ValueError, "generator must not be given"),
        (FLUX_PROMPTS, {"num_images_per_prompt": 2}, ValueError, "num_images_per_prompt must not be given"),
        (FLUX_PROMPTS, {"capture": "nowhere"}, ValueError, "no submodule 'nowhere'"),
    ],
)
def test_arguments_are_checked(prompts: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PipelineSource(flux_case().pipe, prompts, **({"steps": 3} | settings))


def test_pipelines_are_checked() -> None:
    case = flux_case()
    for target, message in (
        (case.pipe.transformer, "pipe must be a pipeline .* got FluxTransformer2DModel"),
        (tiny_pipeline(), "the call of pipe must take num_inference_steps, that of TinyPipeline does not"),
    ):
        with pytest.raises(TypeError, match=message):
            PipelineSource(target, ["one"], steps=3)
    second = wan22_case()
    second.pipe.transformer_2.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="must have no cache of diffusers enabled"):
        second.source()
    enable(case.pipe)
    with pytest.raises(ValueError, match=r"call lesa.disable\(pipe\) first"):
        case.source()
    disable(case.pipe)
    source = case.source()
    enable(case.pipe)
    with pytest.raises(ValueError, match=r"call lesa.disable\(pipe\) first"):
        source.run([0], in_full)
    assert find_hook(case.pipe.transformer) is not None
    disable(case.pipe)
    case.pipe.transformer = None
    with pytest.raises(TypeError, match="its transformer is None"):
        case.source()

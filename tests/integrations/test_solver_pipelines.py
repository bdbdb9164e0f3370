"""The learned solver in diffusers' pipelines: what is fitted is what runs; other runs are refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
    UniPCMultistepScheduler,
)
from tiny_pipelines import (
    FLUX_NEGATIVE,
    TEXT_TOKENS,
    counting,
    flux,
    flux_sample,
    flux_transformer,
    noise,
    qwen_image,
    wan,
)
from torch import Tensor

from lesa_kernels import Schedule, SolverPredictor, TaylorSeer
from lesa_kernels.integrations import LesaWarning, PipelineSource, disable, enable, summary
from lesa_kernels.training import SolverFits

STEPS = 10
SCHEDULE = Schedule.explicit(STEPS, [0, 2, 5, 8])
FORECAST = STEPS - 4

_FLUX_PROMPT = {"prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=1), "pooled_prompt_embeds": noise(1, 8, seed=2)}
_NEGATIVE = {name: value for name, value in FLUX_NEGATIVE.items() if name != "true_cfg_scale"}


def _flux() -> tuple[Any, Callable[..., Tensor], dict[str, Any], dict[str, Any]]:
    pipe = flux(FluxPipeline)
    return pipe, flux_sample(pipe), _FLUX_PROMPT, {"height": 8, "width": 8}


def _flux_guided() -> tuple[Any, Callable[..., Tensor], dict[str, Any], dict[str, Any]]:
    pipe = flux(FluxPipeline)
    sample = flux_sample(pipe, **FLUX_NEGATIVE)
    return pipe, sample, _FLUX_PROMPT | _NEGATIVE, {"height": 8, "width": 8, "true_cfg_scale": 3.0}


def _qwen() -> tuple[Any, Callable[..., Tensor], dict[str, Any], dict[str, Any]]:
    pipe, sample = qwen_image()
    prompt = {
        f"{kind}prompt_embeds{part}": value
        for kind, seed in (("", 1), ("negative_", 3))
        for part, value in (
            ("", noise(1, TEXT_TOKENS, 8, seed=seed)),
            ("_mask", torch.ones(1, TEXT_TOKENS, dtype=torch.long)),
        )
    }
    return pipe, sample, prompt, {"height": 32, "width": 32, "true_cfg_scale": 3.0}


def _wan() -> tuple[Any, Callable[..., Tensor], dict[str, Any], dict[str, Any]]:
    pipe, sample = wan()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    prompt = {
        "prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=1),
        "negative_prompt_embeds": noise(1, TEXT_TOKENS, 8, seed=2),
    }
    return pipe, sample, prompt, {"height": 16, "width": 16, "num_frames": 5, "guidance_scale": 4.0}


PIPELINES = {"flux": _flux, "flux guided": _flux_guided, "qwen": _qwen, "wan": _wan}


def _fitted(name: str, runs: int = 2) -> tuple[Any, Callable[..., Tensor], SolverFits, SolverPredictor]:
    """Build a pipeline, and fit a solver to it."""
    pipe, sample, prompt, shared = PIPELINES[name]()
    fits = SolverFits(PipelineSource(pipe, [prompt] * runs, steps=STEPS, **shared), progress=False)
    return pipe, sample, fits, fits.fit(SCHEDULE, progress=False)


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_fitted_is_what_runs(name: str) -> None:
    pipe, sample, fits, predictor = _fitted(name)
    plain = sample(STEPS)
    enable(pipe, predictor)
    with counting(pipe.transformer) as count:
        first = sample(STEPS)
    calls = 2 if predictor.branches else 1
    result = summary(pipe)
    assert result.refused is None
    assert (result.full, result.forecast) == (4 * calls, FORECAST * calls)
    blocks = result.skipped_blocks // result.forecast
    assert count.blocks == result.full * blocks
    reached = fits._reached(predictor.full_steps, STEPS, 0)
    assert (first - reached).norm() < 1e-3 * (plain - reached).norm()
    assert torch.equal(sample(STEPS), first), "a second run finds the memory of the first"
    disable(pipe)
    assert torch.equal(sample(STEPS), plain)


def test_the_guidance_that_is_found_is_that_of_the_call() -> None:
    rules = {name: _fitted(name, 1)[3].guidance for name in PIPELINES}
    assert rules["flux"] == ()
    for name, rule, scale in (("flux guided", "linear", 3), ("qwen", "norm", 3), ("wan", "linear", 4)):
        assert [(each.rule, round(each.scale, 3)) for each in rules[name]] == [(rule, scale)] * 4


@pytest.mark.parametrize("name", ["flux", "flux guided", "qwen"])
def test_in_bfloat16(name: str) -> None:
    pipe, sample, prompt, shared = PIPELINES[name]()
    pipe.transformer.to(torch.bfloat16)
    halves = {key: value.bfloat16() if value.is_floating_point() else value for key, value in prompt.items()}
    fits = SolverFits(PipelineSource(pipe, [halves], steps=STEPS, **shared), progress=False)
    predictor = fits.fit(SCHEDULE, progress=False)
    enable(pipe, predictor)
    negative = {key: value for key, value in halves.items() if key in prompt}
    made = sample(STEPS, **negative)
    assert summary(pipe).refused is None
    assert made.dtype == torch.bfloat16
    reached = fits._reached(predictor.full_steps, STEPS, 0)
    torch.testing.assert_close(made.float(), reached, rtol=0.05, atol=0.05)


def test_channels_of_a_condition_are_left_aside() -> None:
    # As FLUX Fill and Canny have them: the model takes more channels than it returns.
    from diffusers import FluxControlPipeline

    pipe = flux(FluxControlPipeline, flux_transformer(8, 4))
    shared = {
        "height": 8,
        "width": 8,
        "control_image": torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(5)),
    }
    fits = SolverFits(PipelineSource(pipe, [_FLUX_PROMPT], steps=STEPS, **shared), progress=False)
    predictor = fits.fit(SCHEDULE, progress=False)
    enable(pipe, predictor)
    made = flux_sample(pipe, **shared)(STEPS)
    assert summary(pipe).refused is None
    torch.testing.assert_close(made, fits._reached(predictor.full_steps, STEPS, 0), rtol=1e-3, atol=1e-3)


def _refused(
    pipe: Any, sample: Callable[..., Tensor], predictor: SolverPredictor, message: str, **arguments: Any
) -> None:
    """Check that a run is sampled as without a predictor from where it differs, and says why."""
    disable(pipe)
    plain = sample(STEPS, **arguments)
    enable(pipe, predictor)
    with pytest.warns(LesaWarning, match=message):
        made = sample(STEPS, **arguments)
    assert torch.equal(made, plain), "full steps from the first step on"


def test_other_guidance_is_refused() -> None:
    pipe, sample, _, predictor = _fitted("flux guided")
    _refused(pipe, sample, predictor, r"step 0 had guidance of scale 5, .*calibrated with scale 3", true_cfg_scale=5.0)
    _refused(pipe, sample, predictor, "step 0 made the calls", true_cfg_scale=1.0)
    unguided = _fitted("flux")[3]
    _refused(pipe, sample, unguided, r"step 0 made the calls \('cond', 'uncond'\)")


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            r"UniPCMultistepScheduler takes others: pipe.scheduler = FlowMatchEulerDiscreteScheduler\(shift=3.0\)",
        ),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True), "stochastic_sampling=False"),
        (FlowMatchHeunDiscreteScheduler(shift=3.0), "sigmas repeat"),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            "DPMSolverMultistepScheduler takes others",
        ),
    ],
)
# NumPy's remark on how diffusers reads a tensor.
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_other_schedulers_are_refused_with_the_line_that_sets_them_right(scheduler: Any, message: str) -> None:
    pipe, sample, _, predictor = _fitted("wan")
    pipe.scheduler = scheduler
    enable(pipe, predictor)
    with pytest.warns(LesaWarning, match=message):
        sample(STEPS)
    assert summary(pipe).forecast == 0


def test_latents_that_a_callback_changes_are_noticed() -> None:
    pipe, sample, _, predictor = _fitted("flux")

    def change(pipe: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": given["latents"] + 0.5 * torch.ones_like(given["latents"])} if step == 5 else {}

    enable(pipe, predictor)
    with pytest.warns(LesaWarning, match="step 5 moved the latents otherwise"):
        sample(STEPS, callback_on_step_end=change)
    assert summary(pipe).forecast == 1 + 2


def test_a_run_that_starts_late_gets_the_training_free_forecaster() -> None:
    pipe, _, _, predictor = _fitted("flux")
    late = flux(FluxImg2ImgPipeline, pipe.transformer)
    enable(late, predictor)
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with pytest.warns(
        LesaWarning, match="starts at step 4, the learned solver was fitted for a start at step 0: Taylor"
    ):
        late(
            image=image,
            strength=0.6,
            num_inference_steps=STEPS,
            height=8,
            width=8,
            output_type="latent",
            **_FLUX_PROMPT,
        )
    result = summary(late)
    assert result.refused is None
    assert result.forecast > 0


def test_other_sigmas_are_refused() -> None:
    pipe, sample, _, predictor = _fitted("flux")
    _refused(pipe, sample, predictor, "other sigmas", sigmas=[1 - (step / STEPS) ** 2 for step in range(STEPS)])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"capture": "norm_out"}, ValueError, "capture must be None for a learned solver"),
        ({"history_dtype": torch.bfloat16}, ValueError, "history_dtype must be None"),
        ({"check_every": 1}, ValueError, "check_every must be None"),
    ],
)
def test_options_of_features_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    pipe, _, _, predictor = _fitted("flux", 1)
    with pytest.raises(kind, match=message):
        enable(pipe, predictor, **options)
    with pytest.raises(TypeError, match="serves all cache contexts at once"):
        enable(pipe, {"cond": predictor, "uncond": TaylorSeer()})


def test_a_schedule_that_it_was_not_fitted_for_runs_full() -> None:
    pipe, sample, _, predictor = _fitted("flux", 1)
    plain = sample(STEPS)
    enable(pipe, predictor, Schedule.explicit(STEPS, [0, 5]))
    with pytest.warns(LesaWarning, match=r"schedule must have the full steps \(0, 2, 5, 8\)"):
        assert torch.equal(sample(STEPS), plain)

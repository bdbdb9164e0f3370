"""The learned solver in diffusers' pipelines: what is fitted is what runs; other runs are refused, with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from tiny_pipelines import counting, flux, flux_transformer
from tiny_sources import (
    STEPS,
    Case,
    flux_case,
    flux_cfg_case,
    flux_image_case,
    hunyuan_case,
    qwen_case,
    sd3_case,
    sd3_image_case,
    wan22_case,
    wan_case,
    z_image_case,
)
from torch import Tensor

from lesa_kernels import Schedule, SolverPredictor, TaylorSeer
from lesa_kernels.integrations import LesaWarning, disable, enable, summary
from lesa_kernels.integrations.cache_hooks import ForwardCall, Parameters
from lesa_kernels.training import SolverFits, fit

SCHEDULE = Schedule.explicit(STEPS, [0, 2, 4])
FULL, FORECAST = 3, 3
# Calls of the model in a step; the rule and the scale of its guidance.
CASES: dict[str, tuple[Callable[[], Case], int, tuple[str, float] | None]] = {
    "flux": (flux_case, 1, None),
    "hunyuan": (hunyuan_case, 1, None),
    "flux_cfg": (flux_cfg_case, 2, ("linear", 3)),
    "qwen": (qwen_case, 2, ("norm", 3)),
    "wan": (wan_case, 2, ("linear", 4)),
    "wan22": (wan22_case, 2, ("linear", 4)),
    "sd3": (sd3_case, 1, ("linear", 3)),
    # Its pipeline puts cond first, takes the negative, and counts the scale from cond: 1 - (1 + 2).
    "z_image": (z_image_case, 1, ("linear", -2)),
}


def _fitted(case: Case, **options: Any) -> tuple[SolverFits, SolverPredictor]:
    """Fit a solver to the runs of a case."""
    fits = SolverFits(case.source(**options), progress=False, batch=2)
    return fits, fits.fit(SCHEDULE, progress=False)


@pytest.mark.parametrize("name", CASES)
def test_what_is_fitted_is_what_runs(name: str) -> None:
    make, calls, guidance = CASES[name]
    case = make()
    plain = case.plain(0)
    fits, predictor = _fitted(case)
    if guidance is None:
        assert predictor.guidance == ()
    else:
        assert (predictor.guidance[0].rule, predictor.guidance[0].scale) == (
            guidance[0],
            pytest.approx(guidance[1], abs=1e-3),
        )
    assert predictor.is_batched == (guidance is not None and calls == 1)
    assert predictor.sign == (-1 if name == "z_image" else 1)
    enable(case.pipe, predictor)
    told = _listen(case)
    with counting(*case.models()) as count:
        made = case.plain(0)
    assert told[:calls] == [pytest.approx(predictor.first_timestep)] * calls
    # Z-Image counts up from 0.
    assert min(told[0], told[-1]) < told[calls] < max(told[0], told[-1])
    result = summary(case.pipe)
    assert result.refused is None
    assert (result.full, result.forecast) == (FULL * calls, FORECAST * calls)
    assert count.blocks * FORECAST == result.skipped_blocks * FULL or name in ("wan22", "z_image")
    assert torch.equal(case.plain(0), made), "a second run finds the memory of the first"
    disable(case.pipe)
    assert torch.equal(case.plain(0), plain)
    fits._source.run([0], _Follow(fits, predictor))
    torch.testing.assert_close(made.flatten(), case.latents[-1].flatten(), rtol=1e-3, atol=1e-3)


def _listen(case: Case) -> list[float]:
    """Return a list that receives what enabled models are told of the noise level, call by call."""
    told: list[float] = []
    for model in case.models():
        reference = model._diffusers_hook.get_hook("lesa").fn_ref
        names = list(inspect.signature(type(model).forward).parameters)[1:]

        def forward(*args: Any, forward: Any = reference.original_forward, names: Any = names, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            told.append(float(given["timestep" if "timestep" in given else "t"].flatten()[0]))
            return forward(*args, **kwargs)

        reference.original_forward = forward
    return told


class _Follow:
    """Answers the calls of one run as a fit does: the model at full steps, its velocity at the others."""

    def __init__(self, fits: SolverFits, predictor: SolverPredictor) -> None:
        self._fits, self._full, self._timestep = fits, predictor.full_steps, predictor.first_timestep
        self._sign, self._is_batched = predictor.sign, predictor.is_batched

    def __call__(self, call: Any) -> Tensor:
        if call.step in self._full:
            if call.step == 0:
                call.tell(self._timestep)
            output: Tensor = call.tail(call.blocks())
            self._dtype = output.dtype
            return output
        begun = self._fits._path(self._full)[: sum(step < call.step for step in self._full)]
        end = next((step for step in self._full if step > call.step), STEPS)
        velocity = self._sign * self._fits._velocity(begun, end, 0)[:1].to(self._dtype)
        return torch.cat([velocity, velocity]) if self._is_batched else velocity


@pytest.mark.parametrize("name", ["flux", "flux_cfg", "qwen", "sd3"])
def test_in_bfloat16(name: str) -> None:
    case = CASES[name][0]()
    case.pipe.transformer.to(torch.bfloat16)

    def half(arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in arguments.items()
        }

    case = replace(case, prompts=[half(prompt) for prompt in case.prompts], arguments=half(case.arguments))
    fits, predictor = _fitted(case)
    enable(case.pipe, predictor)
    made = case.plain(0)
    assert summary(case.pipe).refused is None
    assert made.dtype == torch.bfloat16
    disable(case.pipe)
    fits._source.run([0], _Follow(fits, predictor))
    torch.testing.assert_close(made, case.latents[-1], rtol=0.05, atol=0.05)


def test_channels_of_a_condition_are_left_aside() -> None:
    # As FLUX Fill and Canny have them: the model takes more channels than it returns.
    from diffusers import FluxControlPipeline

    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    plain = flux_case()
    pipe = flux(FluxControlPipeline, flux_transformer(8, 4))
    case = Case(pipe, plain.prompts, plain.arguments | {"control_image": image})
    _, predictor = _fitted(case)
    enable(case.pipe, predictor)
    case.plain(0)
    assert summary(case.pipe).refused is None


def _check_refused(case: Case, predictor: SolverPredictor, message: str, **arguments: Any) -> None:
    """Check that a run is sampled as without a predictor, but for what its first call was told, and says why."""
    changed = replace(case, arguments=case.arguments | arguments)
    disable(case.pipe)
    plain = changed.plain(0)
    enable(case.pipe, predictor)
    with pytest.warns(LesaWarning, match=message) as warned:
        made = changed.plain(0)
    if "other sigmas" in message:
        assert torch.equal(made, plain)
    else:
        assert "its first call was told another noise level" in str(warned[0].message)
        assert 0 < (made - plain).float().norm() < 0.2 * plain.float().norm()


def test_other_guidance_is_refused() -> None:
    guided, unguided = flux_cfg_case(), flux_case()
    predictor = _fitted(guided)[1]
    _check_refused(guided, predictor, "step 0 had guidance of scale 5, .*calibrated with scale 3", true_cfg_scale=5.0)
    _check_refused(guided, predictor, "step 0 made the calls", true_cfg_scale=1.0)
    predictor = _fitted(unguided)[1]
    _check_refused(replace(guided, pipe=unguided.pipe), predictor, r"step 0 made the calls \('cond', 'uncond'\)")
    batched = sd3_case()
    predictor = _fitted(batched)[1]
    _check_refused(batched, predictor, "step 0 had guidance of scale 4", guidance_scale=4.0)
    _check_refused(batched, predictor, "two equal halves", guidance_scale=1.0)


# NumPy's remark on how diffusers reads a tensor.
@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (
            UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
            r"UniPCMultistepScheduler takes others: pipe.scheduler = FlowMatchEulerDiscreteScheduler\(shift=3.0\)",
        ),
        (FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True), "stochastic_sampling=False"),
        (FlowMatchHeunDiscreteScheduler(shift=3.0), "steps of order 2"),
        (
            DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            "DPMSolverMultistepScheduler takes others",
        ),
    ],
)
def test_other_schedulers_are_refused_with_the_line_that_sets_them_right(scheduler: Any, message: str) -> None:
    case = wan_case()
    predictor = _fitted(case)[1]
    case.pipe.scheduler = scheduler
    enable(case.pipe, predictor)
    with pytest.warns(LesaWarning, match=message):
        case.plain(0)
    assert summary(case.pipe).forecast == 0
    disable(case.pipe)
    if "steps of order 2" not in message:
        with pytest.raises(ValueError, match=message):
            SolverFits(case.source(), progress=False)


def test_guidance_in_half_precision_is_noticed_without_branches() -> None:
    case = sd3_case()
    unguided = replace(case, arguments=case.arguments | {"guidance_scale": 1.0})
    predictor = _fitted(unguided)[1]
    assert predictor.branches == ()
    case.pipe.transformer.to(torch.bfloat16)
    half = {key: value.bfloat16() if isinstance(value, Tensor) else value for key, value in case.arguments.items()}
    prompts = [{key: value.bfloat16() for key, value in prompt.items()} for prompt in case.prompts]
    _check_refused(replace(case, arguments=half, prompts=prompts), predictor, "step 0 was guided in one call")


def test_a_model_that_is_not_told_one_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = flux_case()
    predictor, plain = _fitted(case)[1], case.plain(0)
    monkeypatch.setattr(ForwardCall, "timestep", lambda call: None)
    enable(case.pipe, predictor)
    with pytest.warns(LesaWarning, match="this model is not told one number in a tensor as timestep") as warned:
        made = case.plain(0)
    assert torch.equal(made, plain)
    assert "its first call" not in str(warned[0].message)


@pytest.mark.parametrize("is_positional", [True, False])
def test_a_call_is_told_another_level(is_positional: bool) -> None:
    latents, level = torch.zeros(2, 3), torch.tensor(1000.0).expand(2)

    def model(module: str, x: Tensor, t: Tensor, again: Tensor, scale: float) -> tuple[Any, ...]:
        return module, x, t, again, scale

    parameters = Parameters(("x", "t", "again", "scale"), ("timestep", "t"))
    args = (latents, level) if is_positional else (latents,)
    kwargs = {"again": level, "scale": 2.0} | ({} if is_positional else {"t": level})
    call = ForwardCall(partial(partial(model, "module"), *args, **kwargs), parameters, args, kwargs, latents)
    assert call.timestep() == call.largest_timestep() == 1000 and call.latents is latents
    told = call.retold(900.5)
    assert told is not None and told.timestep() == 900.5
    module, x, t, again, scale = told.run()
    assert (module, scale) == ("module", 2.0) and x is latents and again is t
    assert t.tolist() == [900.5] * 2 and t.stride() == level.stride()
    assert call.run()[2] is level


@pytest.mark.parametrize("level", [torch.tensor([0.0, 1.0]), 1.0, None])
def test_what_is_not_one_number_is_not_told(level: Any) -> None:
    parameters = Parameters(("x", "timestep"), ("timestep",))
    call = ForwardCall(partial(len), parameters, (torch.zeros(2),), {"timestep": level}, torch.zeros(2))
    assert call.timestep() is None and call.retold(0.5) is None
    assert call.largest_timestep() == (None if level is None else 1)


def test_latents_that_a_callback_changes_are_noticed() -> None:
    case = flux_case()

    def change(pipe: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": given["latents"] + 0.5} if step == 2 else {}

    enable(case.pipe, _fitted(case)[1])
    with pytest.warns(LesaWarning, match="step 2 moved the latents otherwise"):
        replace(case, arguments=case.arguments | {"callback_on_step_end": change}).plain(0)
    assert summary(case.pipe).forecast == 1


def test_a_prompt_that_is_exchanged_ends_the_forecasts() -> None:
    case = flux_case()

    def change(pipe: Any, step: int, timestep: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": given["prompt_embeds"] + 0.5} if step == 1 else {}

    enable(case.pipe, _fitted(case)[1])
    arguments = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with pytest.warns(LesaWarning, match="full steps for the rest of this run: encoder_hidden_states changed"):
        replace(case, arguments=case.arguments | arguments).plain(0)
    assert summary(case.pipe).restarts == ((2, "encoder_hidden_states changed"),)


def test_a_run_that_starts_late_gets_the_training_free_forecaster() -> None:
    predictor, late = _fitted(flux_case())[1], flux_image_case(0.6)
    enable(late.pipe, predictor)
    with pytest.warns(LesaWarning, match="starts at step 2, the learned solver was fitted for a start at step 0"):
        late.plain(0)
    assert summary(late.pipe).refused is None
    assert summary(late.pipe).forecast > 0


def test_a_fit_for_runs_that_start_late_serves_them() -> None:
    late = flux_image_case(0.6)
    assert late.source().first_step == 2
    fits = SolverFits(late.source(), progress=False)
    predictor = fits.fit(Schedule.explicit(STEPS, [0, 3, 5]), progress=False)
    assert predictor.full_steps == (2, 3, 5)
    enable(late.pipe, predictor)
    made = late.plain(0)
    assert summary(late.pipe).refused is None
    assert (summary(late.pipe).full, summary(late.pipe).forecast) == (3, 1)
    torch.testing.assert_close(made, fits._reached(fits._path((2, 3, 5)), STEPS, 0), rtol=1e-4, atol=1e-4)
    disable(late.pipe)
    with pytest.raises(ValueError, match="they start at step 2: fit_solver takes such"):
        fit(late.source(), SCHEDULE, progress=False)


def test_other_sigmas_and_other_schedules_are_refused() -> None:
    case = flux_case()
    predictor = _fitted(case)[1]
    _check_refused(case, predictor, "other sigmas", sigmas=[1 - (step / STEPS) ** 2 for step in range(STEPS)])
    disable(case.pipe)
    plain = case.plain(0)
    enable(case.pipe, predictor, Schedule.explicit(STEPS, [0, 3]))
    with pytest.warns(LesaWarning, match=r"schedule must have the full steps \(0, 2, 4\)"):
        assert torch.equal(case.plain(0), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture": "norm_out"}, "capture must be None for a learned solver"),
        ({"history_dtype": torch.bfloat16}, "history_dtype must be None"),
        ({"check_every": 1}, "check_every must be None"),
    ],
)
def test_options_of_features_are_refused(options: dict[str, Any], message: str) -> None:
    case = flux_case()
    predictor = SolverPredictor([1.0, 0.5, 0.0], [0])
    with pytest.raises(ValueError, match=message):
        enable(case.pipe, predictor, **options)
    with pytest.raises(TypeError, match="serves all cache contexts at once"):
        enable(case.pipe, {"cond": predictor, "uncond": TaylorSeer()})


def test_a_finer_target_passes_all_levels_and_leads_nearer_to_the_solution() -> None:
    case = flux_case()
    source = case.source()
    finer = source.refined(4)
    assert len(finer.sigmas) == 4 * STEPS + 1
    assert finer.sigmas[::4] == pytest.approx(source.sigmas, abs=1e-6)
    assert finer.identity != source.identity
    assert "set_timesteps" not in vars(case.pipe.scheduler)
    aimed, plain = SolverFits(source, target=finer, progress=False), SolverFits(source, progress=False)
    solution = SolverFits(source.refined(16), progress=False)._batches[0].target[-1]
    ends = [(each._reached(each._path((0, 2, 4)), STEPS, 0) - solution).norm() for each in (aimed, plain)]
    assert ends[0] < ends[1]
    with pytest.raises(ValueError, match="parts must be at least 2"):
        source.refined(1)
    case.pipe.get_timesteps = lambda sigmas, timesteps, steps, strength: (sigmas, timesteps, steps)
    with pytest.raises(ValueError, match=r"refined\(\) serves no FluxPipeline"):
        source.refined(2)


# 6 steps start at step int(6 - 6 * strength); int(24 - 24 * strength), of four times as many, is another level.
@pytest.mark.parametrize("make", [flux_image_case, sd3_image_case])
@pytest.mark.parametrize(("strength", "first"), [(0.6, 2), (0.9, 0)])
def test_a_finer_target_starts_late_where_its_source_does(
    make: Callable[[float], Case], strength: float, first: int
) -> None:
    case = make(strength)
    source = case.source()
    finer = source.refined(2).refined(2)
    assert (source.first_step, finer.first_step) == (first, 4 * first)
    methods = set(vars(case.pipe)) | set(vars(case.pipe.scheduler))
    assert not methods & {"set_timesteps", "get_timesteps"}
    aimed, plain = (SolverFits(source, target=target, progress=False) for target in (finer, None))
    reached, own = aimed._batches[0], plain._batches[0]
    assert torch.equal(reached.target[first], own.target[first])
    solution = SolverFits(source.refined(16), progress=False)._batches[0].target
    distances = [(batch.target[-1] - solution[-1]).norm() for batch in (reached, own)]
    assert distances[0] < distances[1] / 2
    other = replace(case, arguments=case.arguments | {"strength": 0.3}).source().refined()
    with pytest.raises(ValueError, match=rf"begin its runs at step {4 * first}, .*, it begins at step 16"):
        SolverFits(source, target=other, progress=False)


def test_the_second_transformer_has_guidance_of_its_own() -> None:
    case = wan22_case()
    predictor = _fitted(case)[1]
    assert sorted({round(each.scale, 3) for each in predictor.guidance}) == [2, 4]
    changed = replace(case, arguments=case.arguments | {"guidance_scale": 6.0})
    enable(case.pipe, predictor)
    with pytest.warns(LesaWarning) as warnings:
        changed.plain(0)
    assert len(warnings) == 1, "the second model samples in full without a word of its own"
    assert summary(case.pipe).forecast == 0
    changed = replace(case, arguments=case.arguments | {"guidance_scale_2": 3.0})
    enable(case.pipe, predictor)
    with pytest.warns(LesaWarning, match=r"had guidance of scale 3, .*calibrated with scale 2"):
        changed.plain(0)

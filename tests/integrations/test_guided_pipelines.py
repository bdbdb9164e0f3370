"""Fits through the tail of diffusers' pipelines with guidance: each branch is served with what was fitted to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pipelines import blocks_of, counting

pytest.importorskip("transformers", reason="diffusers' pipelines import transformers")

from tiny_sources import BRANCHES, CASES, SPARSE, STEPS, Case, sd3_case, wan22_case

from lesa_kernels import LinearPredictor, Reuse, Schedule, TaylorSeer
from lesa_kernels.integrations import LesaWarning, disable, enable, summary
from lesa_kernels.training import Evaluator, fit
from lesa_kernels.training.plan_policy import PlanPolicy
from lesa_kernels.training.references import reference_run

GUIDED = ["flux cfg", "qwen", "sd3", "wan", "z_image"]
every_guided = pytest.mark.parametrize("name", GUIDED)


def _fitted(case: Case) -> dict[str, LinearPredictor]:
    found = fit(case.source(), SPARSE, rounds=3, batch=3, progress=False)
    assert isinstance(found, dict)
    return found


@every_guided
def test_what_is_fitted_is_what_runs(name: str) -> None:
    case = CASES[name]()
    predictors = _fitted(case)
    assert set(predictors) == {"cond", "uncond"}
    assert not torch.allclose(predictors["cond"].coefficients, predictors["uncond"].coefficients, equal_nan=True)
    source = case.source()
    reference = reference_run(source, [2], [STEPS])
    plain = case.plain(2)
    torch.testing.assert_close(reference.latents[STEPS].reshape(plain.shape), plain, rtol=1e-4, atol=1e-4)
    policy = PlanPolicy({branch: each.plan(source.sigmas, SPARSE) for branch, each in predictors.items()}, reference)
    source.run([2], policy)
    assert policy.final is not None
    enable(case.pipe, predictors)
    with counting(case.pipe.transformer) as count:
        served = case.plain(2)
    calls = len(BRANCHES.get(name, ("cond",)))
    assert (summary(case.pipe).full, summary(case.pipe).forecast) == (3 * calls, 3 * calls)
    assert count.blocks == 3 * calls * len(blocks_of(case.pipe.transformer))
    disable(case.pipe)
    torch.testing.assert_close(served, policy.final.reshape(served.shape), rtol=1e-4, atol=1e-4)
    # What is another branch's gives something else.
    enable(case.pipe, {"cond": predictors["uncond"], "uncond": predictors["cond"]})
    assert not torch.allclose(case.plain(2), served, rtol=1e-3, atol=1e-3)


@every_guided
def test_fits_come_nearer_than_their_start(name: str) -> None:
    case = CASES[name]()
    evaluator = Evaluator(case.source(), batch=3, progress=False)
    taylor = dict.fromkeys(("cond", "uncond"), TaylorSeer(2))
    assert evaluator(_fitted(case), SPARSE) > evaluator(taylor, SPARSE) + 0.5


@pytest.mark.parametrize("settings", [{}, {"check_every": 1}, {"history_dtype": torch.bfloat16}])
def test_halves_of_one_call_have_histories_of_their_own(settings: dict[str, Any]) -> None:
    case = sd3_case()
    enable(case.pipe, TaylorSeer(2, variable="sigma"), SPARSE, **settings)
    shared, of_shared = case.plain(0), summary(case.pipe)
    enable(case.pipe, dict.fromkeys(("cond", "uncond"), TaylorSeer(2, variable="sigma")), SPARSE, **settings)
    halves, of_halves = case.plain(0), summary(case.pipe)
    torch.testing.assert_close(halves, shared, rtol=1e-6, atol=1e-6)
    assert of_halves.history_bytes == of_shared.history_bytes > 0
    if settings.get("check_every"):
        errors = zip(of_halves.errors, of_shared.errors, strict=True)
        assert all(half >= whole > 0 for (_, half), (_, whole) in errors)
    else:
        assert not of_halves.errors


def test_what_is_not_two_halves_runs_in_full() -> None:
    case = sd3_case()
    predictors = dict.fromkeys(("cond", "uncond"), Reuse())
    case.arguments["guidance_scale"] = 1.0
    plain = case.plain(0)
    enable(case.pipe, predictors, SPARSE)
    with pytest.warns(LesaWarning, match="its latents are not two equal halves") as caught:
        assert torch.equal(case.plain(0), plain)
    assert len(caught) == 1


def test_halves_have_the_same_full_steps() -> None:
    case = sd3_case()
    plain = case.plain(0)
    other = LinearPredictor.from_rows(case.source().sigmas, Schedule.explicit(STEPS, (0, 3)), {})
    enable(case.pipe, {"cond": Reuse(), "uncond": other}, SPARSE)
    with pytest.warns(LesaWarning, match="of one call must have the same full steps, got .* and "):
        assert torch.equal(case.plain(0), plain)


def test_calls_without_a_context_find_predictors_by_their_number() -> None:
    case = CASES["flux cfg"]()
    enable(case.pipe, {"cond": Reuse(), "cond 2": TaylorSeer(2)}, SPARSE)
    case.pipe.transformer.cache_context = lambda name: torch.no_grad()
    own = case.plain(0)
    assert summary(case.pipe).forecast == 2 * 3
    enable(case.pipe, {"cond": Reuse()}, SPARSE)
    assert not torch.equal(case.plain(0), own)


def test_two_transformers_are_no_source_of_features() -> None:
    with pytest.raises(ValueError, match=r"source must run one model, .* got a call of a second one at step 3"):
        fit(wan22_case().source(), SPARSE, progress=False)

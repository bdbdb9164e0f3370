"""Runs that watch their own forecasts: what the summary shows, and the limit beyond which the rest is full."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_flux import CHANNELS, TinyPipeline, call_arguments, tiny_transformer, watching

from lesa_kernels import Reuse, Schedule
from lesa_kernels.integrations import LesaWarning, enable, summary
from lesa_kernels.integrations.stats import RunStats, summarize

STEPS = 10
SPARSE = Schedule.explicit(STEPS, (0, 1, 5, 8))


def test_the_summary_shows_the_errors_of_checked_steps(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), SPARSE)
    plain = pipe(STEPS)
    enable(pipe, Reuse(), SPARSE, check_every=1)
    with watching(pipe.transformer) as watch:
        assert torch.equal(pipe(STEPS), plain)
    found = dict(summary(pipe).errors)
    assert list(found) == [1, 5, 8]
    for step, error in found.items():
        feature, forecast = watch.features[step], watch.features[step - 1]
        assert error == pytest.approx(((forecast - feature).abs().mean() / feature.abs().mean()).item(), rel=1e-4)
    text = ", ".join(f"{error:.3g} (step {step})" for step, error in found.items())
    assert f"checked steps would have been forecast with a relative error of {text}" in str(summary(pipe))


def test_no_errors_are_shown_without_checks(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), SPARSE)
    pipe(STEPS)
    assert summary(pipe).errors == () and "checked" not in str(summary(pipe))


def test_beyond_the_limit_the_rest_is_full(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), SPARSE, check_every=1)
    pipe(STEPS)
    errors = dict(summary(pipe).errors)
    assert errors[1] < max(errors[5], errors[8])
    limit = 0.5 * (errors[1] + errors[5])
    enable(pipe, Reuse(), SPARSE, check_every=1, max_error=limit)
    with pytest.warns(
        LesaWarning, match=f"step 5 would have been forecast with an error of {errors[5]:.3g}, more than"
    ):
        pipe(STEPS)
    found = summary(pipe)
    assert (found.full, found.forecast) == (7, 3)
    assert dict(found.errors) == pytest.approx({step: errors[step] for step in (1, 5)})
    assert found.refused is not None and f"max_error = {limit:g}" in found.refused


def test_within_the_limit_nothing_changes(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), SPARSE)
    plain = pipe(STEPS)
    enable(pipe, Reuse(), SPARSE, check_every=1, max_error=1e6)
    assert torch.equal(pipe(STEPS), plain)
    assert summary(pipe).refused is None


def test_the_next_run_forecasts_again(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), SPARSE, check_every=1, max_error=1e-9)
    for _ in range(2):
        with pytest.warns(LesaWarning, match="step 1 would have been forecast"):
            pipe(STEPS)
        assert [step for step, _ in summary(pipe).errors] == [1]


def test_of_the_branches_of_guidance_the_worst_is_shown(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), SPARSE, check_every=1)
    pipe(STEPS, true_cfg=2.0)
    assert [step for step, _ in summary(pipe).errors] == [1, 5, 8]
    stats = RunStats(STEPS, errors=[(5, torch.tensor(error)) for error in (0.1, 0.3, 0.2)])
    assert summarize([stats]).errors == ((5, pytest.approx(0.3)),)
    for order in (1, -1):
        stats.errors = [(5, torch.tensor(error)) for error in (0.1, math.nan)][::order]
        ((step, error),) = summarize([stats, stats]).errors
        assert step == 5 and math.isnan(error)


@torch.no_grad()
def test_a_feature_that_is_not_finite_is_within_no_limit() -> None:
    model, sigmas = tiny_transformer(), [1 - step / STEPS for step in range(STEPS + 1)]
    enable(model, Reuse(), SPARSE, sigmas=sigmas, check_every=1, max_error=1e6)
    latents = torch.zeros(1, 6, CHANNELS)
    calls = [call_arguments(latents if step != 1 else latents / 0, sigma) for step, sigma in enumerate(sigmas[:-1])]
    with pytest.warns(LesaWarning, match="step 1 would have been forecast with an error of nan"):
        outputs = [model(**arguments).sample for arguments in calls]
    assert summary(model).full == len(outputs) == STEPS


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"check_every": 0}, ValueError, "check_every must be at least 1, got 0"),
        ({"check_every": 1.0}, TypeError, r"check_every must be an int or None, got 1\.0"),
        ({"check_every": 1, "max_error": 0}, ValueError, "max_error must be greater than 0, got 0"),
        ({"check_every": 1, "max_error": math.nan}, ValueError, "max_error must be greater than 0, got nan"),
        ({"check_every": 1, "max_error": "0.1"}, TypeError, "max_error must be a number, got '0.1'"),
        ({"check_every": 1, "max_error": True}, TypeError, "max_error must be a number, got True"),
        ({"max_error": 0.1}, ValueError, r"max_error must come with check_every, .*, got 0\.1"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    pipe: TinyPipeline, options: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        enable(pipe, Reuse(), SPARSE, **options)  # type: ignore[arg-type]

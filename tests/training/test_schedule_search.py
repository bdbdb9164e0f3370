"""The search for full steps, and schedules for a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch

import lesa_kernels as lesa
from lesa_kernels.training import Evaluator, Score, schedule_for_budget, search_schedule
from lesa_kernels.trajectories import ONLY_BRANCH, LoopSource, ModelCall, RecordedSource, StepPolicy

STEPS = 20
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
WANTED = (0, 5, 6, 12)


class _Counting:
    """Scores by the distance from the wanted full steps; more calls are better; keeps what it was asked."""

    sigmas = tuple(SIGMAS)

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, predictor: lesa.Predictor, schedule: lesa.Schedule) -> Score:
        self.asked.append(schedule.full_steps)
        full = schedule.full_steps
        distance = sum(abs(a - b) for a, b in zip(full, WANTED, strict=False))
        return Score(10.0 * len(full) - distance, full_seconds=0.5, forecast_seconds=0.1)


def _evaluator() -> Any:
    return cast(Evaluator, _Counting())


def _taylor(schedule: lesa.Schedule) -> lesa.Predictor:
    return lesa.TaylorSeer(2)


def test_the_search_walks_to_the_best_schedule() -> None:
    evaluator = _evaluator()
    start = lesa.Schedule.uniform_in_sigma(SIGMAS, 4)
    found = search_schedule(evaluator, start, _taylor, progress=False)
    assert found.schedule.full_steps == WANTED
    assert found.score.psnr_db == 40.0
    assert found.evaluations == len(evaluator.asked) == len(set(evaluator.asked)), "nothing is tried twice"


def test_the_search_keeps_to_its_evaluations_and_is_no_worse_than_its_start() -> None:
    evaluator = _evaluator()
    start = lesa.Schedule.uniform_in_sigma(SIGMAS, 4)
    found = search_schedule(evaluator, start, _taylor, evaluations=5, progress=False)
    assert found.evaluations <= 5
    assert found.score.psnr_db >= evaluator(_taylor(start), start).psnr_db
    with pytest.raises(ValueError, match="evaluations must be at least 1"):
        search_schedule(evaluator, start, _taylor, evaluations=0)


def test_several_starts_share_the_evaluations() -> None:
    evaluator = _evaluator()
    far, near = lesa.Schedule(STEPS, (0, 17, 18, 19)), lesa.Schedule(STEPS, (0, 5, 7, 12))
    found = search_schedule(evaluator, [far, near], _taylor, evaluations=40, progress=False)
    assert found.schedule.full_steps == WANTED
    assert evaluator.asked.index(near.full_steps) == 20, "half of the evaluations belong to the first start"
    with pytest.raises(ValueError, match="got 1 evaluations for 2 starts"):
        search_schedule(evaluator, [far, near], _taylor, evaluations=1)


def test_budgets() -> None:
    by_calls = schedule_for_budget(_evaluator(), _taylor, calls=4, progress=False)
    assert by_calls.schedule.full_steps == WANTED
    # 20 forecasts take 2 s, each full call 0.4 s more: 3.7 s pay for 4 calls.
    by_time = schedule_for_budget(_evaluator(), _taylor, seconds=3.7, progress=False)
    assert len(by_time.schedule.full_steps) == 4
    by_quality = schedule_for_budget(_evaluator(), _taylor, psnr_db=39.0, progress=False)
    assert by_quality.schedule.full_steps == WANTED, "the guess needs more calls, the search finds that 4 do"
    with pytest.raises(ValueError, match="give one budget"):
        schedule_for_budget(_evaluator(), _taylor, calls=4, seconds=1.0)
    with pytest.raises(ValueError, match="seconds must allow one full call"):
        schedule_for_budget(_evaluator(), _taylor, seconds=0.3)
    with pytest.raises(ValueError, match="psnr_db must be within reach"):
        schedule_for_budget(_evaluator(), _taylor, psnr_db=1e6)
    with pytest.raises(ValueError, match="calls must be 1 to 19"):
        schedule_for_budget(_evaluator(), _taylor, calls=20)


def _source(branch: str = ONLY_BRANCH) -> LoopSource:
    """dx/dsigma = feature, which is cubic in sigma and differs from run to run."""

    def loop(runs: Sequence[int], policy: StepPolicy) -> None:
        latents = torch.ones(len(runs), 4)
        scale = torch.tensor([1.0 + run for run in runs])[:, None]
        for step in range(STEPS):
            feature = scale * SIGMAS[step] ** 3 * torch.arange(1.0, 5.0)
            output = policy(ModelCall(step, lambda feature=feature: feature, lambda feature: feature, latents, branch))  # type: ignore[misc]
            assert output is not None
            latents = latents + (SIGMAS[step + 1] - SIGMAS[step]) * output

    return LoopSource(loop, 3, SIGMAS)


def test_the_evaluator_measures_the_final_latents_and_the_times() -> None:
    evaluator = Evaluator(_source(), batch=2, progress=False)
    schedule = lesa.Schedule.explicit(STEPS, (0, 1, 2, 3, 10))
    exact = evaluator(lesa.TaylorSeer(3), schedule)
    rough = evaluator(lesa.Reuse(), schedule)
    assert exact.psnr_db > rough.psnr_db
    assert exact.full_seconds > 0
    assert exact.forecast_seconds > 0
    finals = []
    for predictor in (None, lesa.Reuse()):
        latents, feature = torch.ones(4), torch.zeros(4)
        for step in range(STEPS):
            if predictor is None or step in schedule.full_steps:
                feature = SIGMAS[step] ** 3 * torch.arange(1.0, 5.0)
            latents = latents + (SIGMAS[step + 1] - SIGMAS[step]) * feature
        finals.append(latents - 1)
    # All three runs have the same relative error but for the constant they start from.
    error = [scale * (finals[1] - finals[0]).norm() / (1 + scale * finals[0]).norm() for scale in (1, 2, 3)]
    assert rough.psnr_db == pytest.approx(-20 * torch.stack(error).log10().mean().item(), abs=1e-3)


def test_the_evaluator_follows_the_only_branch() -> None:
    schedule = lesa.Schedule.explicit(STEPS, (0, 1, 2, 3, 10))
    known, other = (
        Evaluator(_source(branch), progress=False)(lesa.Reuse(), schedule) for branch in ("cond", "cond_uncond")
    )
    assert other.psnr_db == known.psnr_db < 60
    assert other.forecast_seconds > 0


def test_an_evaluator_needs_a_model() -> None:
    recorded = RecordedSource([[torch.ones(2)] * STEPS], SIGMAS)
    with pytest.raises(ValueError, match="this one holds features only"):
        Evaluator(recorded, progress=False)

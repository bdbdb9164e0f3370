"""Trainings and fits under `torch.inference_mode`, as a service may call them: the same bits, tensors that train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from small_training import SCHEDULE, SHORT, SIGMAS, STEPS, equal, runs, small_predictor

from lesa_kernels import LinearPredictor, SolverPredictor, TaylorSeer, load_official, load_predictor
from lesa_kernels.training import (
    Evaluator,
    FeatureStore,
    LoopSource,
    SolverFits,
    even_schedules,
    fewest_calls,
    fit,
    fit_solver,
    quality_curve,
    search_schedule,
    train,
)
from lesa_kernels.trajectories import ModelCall, StepPolicy


def flow(inside: bool = False) -> LoopSource:
    """Runs of a model with a tail; the loop itself may be in inference mode, as a pipeline's call is."""

    def loop(chosen: Sequence[int], policy: StepPolicy) -> None:
        latents = torch.stack([torch.randn(4, 3, generator=torch.Generator().manual_seed(run)) for run in chosen])
        for step in range(STEPS):
            feature = torch.tanh(latents) * (1 + SIGMAS[step])
            output = policy(ModelCall(step, lambda feature=feature: feature, torch.sin, latents))  # type: ignore[misc]
            assert output is not None
            latents = latents + (SIGMAS[step + 1] - SIGMAS[step]) * output

    def run(chosen: Sequence[int], policy: StepPolicy) -> None:
        with torch.inference_mode(inside):
            loop(chosen, policy)

    return LoopSource(run, 4, SIGMAS)


def test_a_training_has_the_bits_of_one_outside(tmp_path: Path) -> None:
    want, got = small_predictor(), small_predictor()
    train(want, runs(), SCHEDULE, SHORT, progress=False)
    with torch.inference_mode():
        store = FeatureStore.record(tmp_path, runs(), model="small", progress=False)
        train(got, store, SCHEDULE, SHORT, progress=False)
    assert equal(got, want)


def test_a_predictor_that_was_made_inside_is_refused_before_the_work() -> None:
    with torch.inference_mode():
        predictor = small_predictor()
    with pytest.raises(ValueError, match=r"latent\.0\.weight must be made outside of torch\.inference_mode\(\)"):
        train(predictor, runs(), SCHEDULE, SHORT, progress=False)


def test_a_predictor_that_was_loaded_inside_can_be_trained(tmp_path: Path) -> None:
    small_predictor(1).save_pretrained(tmp_path)
    torch.save({"model": small_predictor(1).state_dict()}, tmp_path / "file.pt")
    with torch.inference_mode():
        loaded = load_predictor(tmp_path)
        (official,) = load_official(tmp_path / "file.pt", thresholds=(0.7, 0.4, 0.0)).values()
    for predictor in (loaded, official):
        train(predictor, runs(), SCHEDULE, SHORT, progress=False)  # type: ignore[arg-type]
    assert equal(loaded, official)  # type: ignore[arg-type]


@pytest.mark.parametrize("inside", [False, True], ids=["mode outside", "mode in the loop too"])
def test_fits_and_searches_give_what_they_give_outside(inside: bool) -> None:
    def everything(inside: bool) -> tuple[LinearPredictor, SolverPredictor, list[object]]:
        linear, solver = (
            fit(flow(inside), SCHEDULE, rounds=3, progress=False),
            fit_solver(flow(inside), SCHEDULE, progress=False),
        )
        assert isinstance(linear, LinearPredictor)
        fits = SolverFits(flow(inside), held_out=2, progress=False)
        judge = fits.psnr_db
        found: list[object] = [
            Evaluator(flow(inside))(TaylorSeer(1), SCHEDULE),
            search_schedule(judge, even_schedules(SIGMAS, 5), placements=3, progress=False),
            fewest_calls(judge, SIGMAS, 10.0, placements=2, progress=False),
            quality_curve(judge, SIGMAS, [4, 5], placements=1, progress=False),
            fits.cross_validated_db(SCHEDULE),
            fits.eulers().psnr_db(SCHEDULE),
        ]
        return linear, solver, found

    want = everything(False)
    with torch.inference_mode():
        got = everything(inside)
    assert got[2] == want[2]
    for mine, other in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(mine.coefficients, other.coefficients, rtol=0, atol=0, equal_nan=True)
        assert not mine.coefficients.is_inference()

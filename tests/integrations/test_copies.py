"""Copies and pickles of what is enabled: enabled themselves, with weights and a run of their own."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: diffusers)")

from diffusers import DDIMScheduler
from tiny_flux import TinyPipeline, call_arguments, tiny_pipeline, tiny_transformer

import lesa_kernels as lesa
from lesa_kernels.integrations.api import given_models
from lesa_kernels.integrations.hooks import attached

STEPS = 10
SCHEDULE = lesa.Schedule.explicit(STEPS, (0, 1, 5))
FULL, FORECAST = 3, 7
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]


def _saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda each: pickle.loads(pickle.dumps(each)),
    "torch.save": _saved,
}
copied_by = pytest.mark.parametrize("way", COPIES)


def enabled_pipeline(**options: Any) -> TinyPipeline:
    pipe = tiny_pipeline()
    lesa.enable(pipe, lesa.TaylorSeer(1), SCHEDULE, **options)
    return pipe


@torch.no_grad()
def own_loop(model: torch.nn.Module, steps: int = STEPS) -> Tensor:
    latents = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        with model.cache_context("cond"):
            latents = latents - 0.1 * model(**call_arguments(latents, SIGMAS[step])).sample
    return latents


@copied_by
def test_a_copy_of_a_pipeline_samples_the_same_and_on_its_own(way: str) -> None:
    pipe = enabled_pipeline()
    want = pipe(STEPS)
    other = COPIES[way](pipe)
    assert torch.equal(other(STEPS), want)
    assert (lesa.summary(other).full, lesa.summary(other).forecast) == (FULL, FORECAST)

    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(2)
    assert not torch.equal(other(STEPS), want)
    assert torch.equal(pipe(STEPS), want)

    lesa.disable(other)
    assert lesa.summary(pipe).forecast == FORECAST
    plain = tiny_pipeline()(STEPS)
    lesa.disable(pipe)
    assert torch.equal(pipe(STEPS), plain)


@copied_by
@pytest.mark.parametrize("predictor", [lesa.TaylorSeer(1), lesa.LesaPredictor(STEPS)], ids=["Taylor", "LESA"])
def test_a_copy_of_a_transformer_with_sigmas_samples_the_same(way: str, predictor: lesa.Predictor) -> None:
    model = tiny_transformer()
    lesa.enable(model, predictor, SCHEDULE, sigmas=SIGMAS)
    want = own_loop(model)
    other = COPIES[way](model)
    assert torch.equal(own_loop(other), want)
    assert lesa.summary(other).forecast == lesa.summary(model).forecast > 0


@copied_by
def test_a_copy_that_is_made_within_a_run_begins_a_new_one(way: str) -> None:
    model = tiny_transformer()
    lesa.enable(model, lesa.TaylorSeer(1), SCHEDULE, sigmas=SIGMAS)
    want = own_loop(model)
    own_loop(model, 4)
    other = COPIES[way](model)
    with pytest.raises(ValueError, match="must have run"):
        lesa.summary(other)
    assert torch.equal(own_loop(other), want)


def test_a_copied_transformer_goes_by_the_pipeline_that_it_comes_from() -> None:
    pipe = enabled_pipeline()
    want = pipe(STEPS)
    pipe.transformer = copy.deepcopy(pipe.transformer)
    assert torch.equal(pipe(STEPS), want)
    assert lesa.summary(pipe).forecast == FORECAST


@copied_by
def test_a_model_of_the_general_path_and_its_tap_are_copied(way: str) -> None:
    pipe = tiny_pipeline()
    lesa.enable(pipe, lesa.TaylorSeer(1), SCHEDULE, capture="proj_out")
    want = pipe(STEPS)
    other = COPIES[way](pipe)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.zero_()
    assert torch.equal(other(STEPS), want)
    assert lesa.summary(other).forecast == FORECAST


def test_a_copy_of_a_compiled_model_samples_the_same() -> None:
    pipe = tiny_pipeline()
    pipe.transformer.compile(backend="eager")
    lesa.enable(pipe, lesa.TaylorSeer(1), SCHEDULE)
    want = pipe(STEPS)
    for way in COPIES.values():
        other = way(pipe)
        assert torch.equal(other(STEPS), want)
        assert lesa.summary(other).forecast == FORECAST


def test_a_pickle_that_needs_its_pipeline_runs_full_steps_and_says_so() -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = DDIMScheduler()
    pipe.scheduler.set_timesteps(STEPS)
    lesa.enable(pipe, lesa.TaylorSeer(1), SCHEDULE)
    model = pickle.loads(pickle.dumps(pipe.transformer))
    with torch.no_grad(), pytest.warns(lesa.LesaWarning, match="comes from a pickle.*enable it again"):
        model(**call_arguments(torch.randn(1, 6, 4), 1.0))


def test_two_pipelines_share_a_predictor_in_two_threads() -> None:
    torch.manual_seed(0)
    predictor = lesa.LesaPredictor(STEPS)
    pipes = [tiny_pipeline() for _ in range(2)]
    for pipe in pipes:
        lesa.enable(pipe, predictor, SCHEDULE)
    alone = [pipe(STEPS, seed=seed) for seed, pipe in enumerate(pipes)]
    both = threading.Barrier(2)

    def sample(seed: int) -> list[Tensor]:
        lesa.enable(pipes[seed], predictor, SCHEDULE)
        both.wait(20)
        return [pipes[seed](STEPS, seed=seed) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        for seed, results in enumerate(pool.map(sample, range(2))):
            assert all(torch.equal(result, alone[seed]) for result in results)
            assert lesa.summary(pipes[seed]).forecast > 0


def _in_child(pipe: TinyPipeline, file: Path) -> None:
    torch.set_num_threads(1)
    torch.save((pipe(STEPS), lesa.summary(pipe).forecast), file)


def test_an_enabled_pipeline_goes_to_a_spawned_process(tmp_path: Path) -> None:
    pipe = enabled_pipeline()
    want = pipe(STEPS)
    child = torch.multiprocessing.get_context("spawn").Process(target=_in_child, args=(pipe, tmp_path / "sample.pt"))
    child.start()
    child.join(120)
    assert child.exitcode == 0
    got, forecast = torch.load(tmp_path / "sample.pt")
    assert torch.equal(got, want) and forecast == FORECAST


def test_a_copy_holds_nothing_of_the_original() -> None:
    pipe = enabled_pipeline()
    pipe(STEPS)
    other = copy.deepcopy(pipe)
    mine, theirs = (attached(given_models(each)[0]) for each in (pipe, other))
    assert mine is not None and theirs is not None
    assert theirs is not mine and theirs.runs is not mine.runs and theirs.tap is not mine.tap

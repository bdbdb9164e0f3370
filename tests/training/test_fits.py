"""Coefficients that are fitted: through the tail, and LESA's own form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import lesa_kernels as lesa
from lesa_kernels.training import Evaluator, fit, fit_solver, runs, tail_fit
from lesa_kernels.training.levenberg_marquardt import LevenbergMarquardt, gram_of
from lesa_kernels.training.plan_policy import PlanPolicy
from lesa_kernels.training.references import reference_run
from lesa_kernels.training.runs import batches
from lesa_kernels.training.tail_fit import MOST_ROUNDS, derivatives
from lesa_kernels.trajectories import ONLY_BRANCH, LoopSource, ModelCall, RecordedSource, StepPolicy

STEPS, RUNS, WIDTH = 12, 6, 8
SIGMAS = [1 - (step / STEPS) ** 1.3 for step in range(STEPS)] + [0.0]
SCHEDULE = lesa.Schedule.explicit(STEPS, (0, 3, 6, 9))
COUNT_FULL = len(SCHEDULE.full_steps)


class _Flow(torch.nn.Module):
    """A velocity field of blocks and a tail that depends on the step, as a transformer's does."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.inner = torch.randn(WIDTH, WIDTH, generator=generator) / 2
        self.out = torch.randn(WIDTH, WIDTH, generator=generator) / 3

    def blocks(self, latents: Tensor, step: int) -> Tensor:
        return torch.tanh(latents @ self.inner + torch.sin(torch.tensor(3.0 * SIGMAS[step])))

    def tail(self, feature: Tensor, step: int) -> Tensor:
        return torch.nn.functional.layer_norm(feature, (WIDTH,)) @ self.out * (1 + SIGMAS[step]) - feature


def _source(
    count: int = RUNS, seed: int = 0, calls: list[int] | None = None, sign: float = 1.0, branch: str = ONLY_BRANCH
) -> LoopSource:
    """Return runs of a flow; with the sign -1 its model returns the negative of what the steps take."""
    model = _Flow()
    noise = torch.randn(count, 5, WIDTH, generator=torch.Generator().manual_seed(seed))

    def blocks(latents: Tensor, step: int) -> Tensor:
        if calls is not None:
            calls.append(step)
        return model.blocks(latents, step)

    def loop(runs: Sequence[int], policy: StepPolicy) -> None:
        latents = noise[list(runs)]
        for step in range(STEPS):

            def tail(feature: Tensor, step: int = step) -> Tensor:
                return sign * model.tail(feature, step)

            output = policy(ModelCall(step, partial(blocks, latents, step), tail, latents, branch))
            assert output is not None
            latents = latents + sign * (SIGMAS[step + 1] - SIGMAS[step]) * output

    return LoopSource(loop, count, SIGMAS)


def _error(predictor: lesa.Predictor, seed: int = 1) -> float:
    source = _source(RUNS, seed)
    policy = PlanPolicy(predictor.plan(SIGMAS, SCHEDULE))
    source.run(range(RUNS), policy)
    assert policy.final is not None
    reference = reference_run(source, range(RUNS), [STEPS]).latents[STEPS]
    return ((policy.final - reference).norm() / reference.norm()).item()


def _features(seed: int = 0) -> list[list[Tensor]]:
    features: list[list[Tensor]] = [[] for _ in range(RUNS)]

    def policy(run: int, call: ModelCall) -> Tensor:
        features[run].append(call.blocks())
        assert call.tail is not None
        return call.tail(features[run][-1])

    for run in range(RUNS):
        _source(seed=seed).run([run], partial(policy, run))
    return features


@pytest.mark.parametrize("count", [1, 5, 70])
def test_gram_of_any_number_of_columns(count: int) -> None:
    columns = list(torch.randn(count, 3, 4))
    wide = torch.stack(columns).double().flatten(1)
    assert torch.allclose(gram_of(columns), wide @ wide.T, atol=1e-5)


def test_derivatives_are_those_of_finite_differences() -> None:
    model = _Flow()
    feature, *directions = torch.randn(3, 2, 5, WIDTH, dtype=torch.float64)
    model.out = model.out.double()
    tail = partial(model.tail, step=4)
    output, slopes = derivatives(tail, feature, directions)
    assert torch.equal(output, tail(feature))
    for direction, slope in zip(directions, slopes, strict=True):
        difference = (tail(feature + 1e-6 * direction) - tail(feature - 1e-6 * direction)) / 2e-6
        assert torch.allclose(slope, difference, atol=1e-6)


def test_damped_fit_reaches_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    design = torch.randn(3, 40, 4, generator=generator, dtype=torch.float64)
    wanted = torch.randn(3, 40, generator=generator, dtype=torch.float64)
    search = LevenbergMarquardt(torch.zeros(4, dtype=torch.float64))
    for _ in range(20):
        for key in range(3):
            residual = design[key] @ search.candidate - wanted[key]
            search.add(key, [design[key, :, column][None] for column in range(4)], residual[None])
        search.close_round()
        if search.finished:
            break
    assert search.finished
    scale = 1 / wanted.norm(dim=1)
    rows = (design * scale[:, None, None]).reshape(-1, 4)
    best = torch.linalg.lstsq(rows, (wanted * scale[:, None]).reshape(-1, 1)).solution[:, 0]
    assert torch.allclose(search.best, best, atol=2e-2)


def test_damped_fit_drops_what_made_things_worse() -> None:
    search = LevenbergMarquardt(torch.zeros(1, dtype=torch.float64))
    search.add(0, [torch.ones(1, 1)], torch.full((1, 1), 2.0))
    search.close_round()
    first = search.candidate.clone()
    search.add(0, [torch.ones(1, 1)], torch.full((1, 1), 9.0))
    search.close_round()
    assert search.best.item() == 0.0
    assert abs(search.candidate.item()) < abs(first.item())


def test_fits_through_the_tail_beat_their_start_on_other_noise() -> None:
    found = fit(_source(), SCHEDULE, batch=RUNS, progress=False)
    assert found.schedule == SCHEDULE
    assert _error(found) < 0.95 * _error(lesa.TaylorSeer(2))


def test_a_pipeline_that_takes_the_negative_of_the_output_is_fitted_alike() -> None:
    plain, negative = (fit(_source(sign=sign), SCHEDULE, batch=RUNS, progress=False) for sign in (1.0, -1.0))
    assert torch.allclose(plain.coefficients, negative.coefficients, atol=1e-4, equal_nan=True)


def _elsewhere() -> LoopSource:
    """Return runs whose latents take half of each step."""
    noise, model = torch.randn(RUNS, 5, WIDTH, generator=torch.Generator().manual_seed(0)), _Flow()

    def loop(runs: Sequence[int], policy: StepPolicy) -> None:
        latents = noise[list(runs)]
        for step in range(STEPS):
            output = policy(
                ModelCall(step, partial(model.blocks, latents, step), partial(model.tail, step=step), latents)
            )
            assert output is not None
            latents = latents + 0.5 * (SIGMAS[step + 1] - SIGMAS[step]) * output

    return LoopSource(loop, RUNS, SIGMAS)


def test_steps_other_than_eulers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"source must step as Euler does.*step 0 moved the latents elsewhere"):
        fit(_elsewhere(), SCHEDULE, batch=RUNS, progress=False)


def test_a_tail_that_loses_the_derivative_is_refused() -> None:
    feature = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"call\.tail must be differentiable in forward mode"):
        derivatives(lambda feature: feature.detach() * 2, feature, [feature])


def test_a_compiled_tail_keeps_its_derivative() -> None:
    def tail(feature: Tensor) -> Tensor:
        return feature.square()

    feature, direction = torch.randn(2, 3), torch.randn(2, 3)
    compiled = torch.compile(tail, backend="eager")
    with torch.no_grad():
        compiled(feature)
        output, (slope,) = derivatives(compiled, feature, [direction])
    torch.testing.assert_close((output, slope), (feature.square(), 2 * feature * direction))


def test_a_fit_goes_on_until_each_segment_has_converged(capsys: pytest.CaptureFixture[str]) -> None:
    few = fit(_source(), SCHEDULE, rounds=2, batch=RUNS)
    shown = capsys.readouterr().out
    assert shown.count("not converged") == shown.count("after 2 rounds") > 0
    enough = fit(_source(), SCHEDULE, batch=RUNS)
    shown = capsys.readouterr().out
    for name in ("steps 1 to 2", "steps 4 to 5", "steps 7 to 8", "steps 10 to 11"):
        assert re.search(rf"{name}: \d+\.\d % of TaylorSeer's distance is left after \d+ rounds, converged", shown)
    again = fit(_source(), SCHEDULE, rounds=MOST_ROUNDS, batch=RUNS, progress=False)
    assert isinstance(enough, lesa.LinearPredictor) and isinstance(again, lesa.LinearPredictor)
    torch.testing.assert_close(enough.coefficients, again.coefficients, equal_nan=True)
    assert isinstance(few, lesa.LinearPredictor) and _error(enough, seed=0) < _error(few, seed=0)
    assert not capsys.readouterr().out, "hidden with the bar"


def test_a_fit_that_does_not_converge_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tail_fit, "MOST_ROUNDS", 2)
    with pytest.warns(UserWarning, match=r"the fit of steps \d+ to \d+ has not converged after 2 rounds"):
        fit(_source(), SCHEDULE, batch=RUNS, progress=False)


def test_small_models_are_computed_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    source, threads = _source(), set()

    def loop(runs: Sequence[int], policy: StepPolicy) -> None:
        def watched(call: ModelCall) -> Tensor | None:
            def blocks() -> Tensor:
                threads.add((call.step > 0, torch.get_num_threads()))
                return call.blocks()

            return policy(replace(call, blocks=blocks))

        source.run(runs, watched)
        assert torch.get_num_threads() == 2

    torch.set_num_threads(2)
    watched = LoopSource(loop, RUNS, SIGMAS)
    for compute in (
        lambda: reference_run(watched, [0], []),
        lambda: fit(watched, SCHEDULE, rounds=2, batch=RUNS, progress=False),
        lambda: Evaluator(watched, batch=RUNS, progress=False)(lesa.Reuse(), SCHEDULE),
        lambda: fit_solver(watched, SCHEDULE, batch=RUNS, progress=False),
    ):
        threads.clear()
        compute()
        # Nothing is known of the model before its first call.
        assert {(True, 1), (False, 2)} <= threads <= {(True, 1), (False, 2), (False, 1)}
    monkeypatch.setattr(runs, "MANY_ELEMENTS", 0)
    threads.clear()
    reference_run(watched, [0], [])
    assert threads == {(True, 2), (False, 2)}


def test_batches_do_not_change_the_fit() -> None:
    whole = fit(_source(), SCHEDULE, batch=RUNS, progress=False)
    parts = fit(_source(), SCHEDULE, batch=4, progress=False)
    assert torch.allclose(whole.coefficients, parts.coefficients, atol=1e-4, equal_nan=True)


def test_a_fit_of_runs_that_are_not_finite_says_so() -> None:
    search = LevenbergMarquardt(torch.ones(1, dtype=torch.float64))
    search.add(0, [torch.ones(1, 3)], torch.tensor([[1.0, torch.nan, 1.0]]))
    with pytest.raises(FloatingPointError, match="must stay finite where the fit of these steps starts"):
        search.close_round()


def test_a_candidate_that_is_not_finite_is_dropped() -> None:
    search = LevenbergMarquardt(torch.ones(1, dtype=torch.float64))
    for value in (1.0, torch.inf):
        search.add(0, [torch.ones(1, 3)], torch.full((1, 3), value))
        search.close_round()
    assert search.best.item() == 1.0 and search.error == pytest.approx(1.0)
    assert 0.5 < search.candidate.item() < 1.0


def test_directions_that_change_nothing_leave_the_start() -> None:
    search = LevenbergMarquardt(torch.ones(2, dtype=torch.float64))
    search.add(0, [torch.zeros(1, 3)] * 2, torch.ones(1, 3))
    search.close_round()
    assert search.finished
    assert torch.linalg.eigvalsh(search.damped_gram).min() > 0


def test_the_fit_of_a_segment_runs_no_blocks_behind_it() -> None:
    calls: list[int] = []
    fit(_source(calls=calls), SCHEDULE, rounds=2, batch=RUNS, progress=False)
    accelerated = calls[STEPS:]
    assert set(accelerated) == set(SCHEDULE.full_steps)
    # The first of four segments is seen by all passes, the last full step by those of the last segment alone.
    passes = [accelerated.count(full) for full in SCHEDULE.full_steps]
    assert passes[0] <= 8 and passes == sorted(set(passes), reverse=True)


def test_wrong_arguments_are_named() -> None:
    recorded = RecordedSource(_features(), SIGMAS)
    with pytest.raises(ValueError, match="this one holds features only"):
        fit(recorded, SCHEDULE, progress=False)
    with pytest.raises(ValueError, match="rounds must be at least 2"):
        fit(_source(), SCHEDULE, rounds=1, progress=False)
    with pytest.raises(ValueError, match="leave a step to forecast"):
        fit(_source(), lesa.Schedule(STEPS, tuple(range(STEPS))))
    with pytest.raises(ValueError, match="batch must be at least 1"):
        batches(recorded, 0)

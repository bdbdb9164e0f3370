"""Fits of the learned solver: on flows whose right answer is known, with and without guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lesa_kernels import Schedule, SolverPredictor, load_predictor
from lesa_kernels.guidance import Guidance
from lesa_kernels.training import LoopSource, RecordedSource, SelectedRuns, SolverFits, fit, fit_solver
from lesa_kernels.training.reports import save_predictors
from lesa_kernels.trajectories import ModelCall, StepPolicy

STEPS, RUNS = 12, 6
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
SCHEDULE = Schedule.explicit(STEPS, [0, 3, 6, 9])

Velocity = Callable[[Tensor, float, Sequence[int]], Tensor]


def _noise(runs: Sequence[int]) -> Tensor:
    return torch.stack([torch.randn(8, 4, generator=torch.Generator().manual_seed(run)) for run in runs])


def _source(
    velocities: dict[str, Velocity],
    guidance: Guidance | None = None,
    *,
    batched: bool = False,
    sigmas: Sequence[float] = SIGMAS,
    sign: float = 1.0,
    disturb: Callable[[Tensor, int], Tensor] = lambda latents, step: latents,
    runs: int = RUNS,
    timesteps: float | None = None,
    heard: list[tuple[int, float]] | None = None,
) -> LoopSource:
    """Return runs of a flow whose model is a formula; of several branches by guidance.

    With `timesteps` the model is told each noise level times that, and may be told another; `heard` receives what it
    was told whenever it ran.
    """

    def loop(chosen: Sequence[int], policy: StepPolicy) -> None:
        latents = _noise(chosen)
        for step, (sigma, after) in enumerate(pairwise(sigmas)):

            def called(
                name: str, *of: Velocity, sigma: float = sigma, step: int = step, latents: Tensor = latents
            ) -> Tensor:
                given = torch.cat([latents] * len(of))

                levels = [sigma]

                def blocks() -> Tensor:
                    if heard is not None:
                        heard.append((step, levels[-1]))
                    return torch.cat([sign * each(latents, levels[-1], chosen) for each in of])

                call = ModelCall(step, blocks, lambda feature: feature, given, name)
                if timesteps is not None:
                    tell = lambda timestep: levels.append(timestep / timesteps)  # noqa: E731
                    call = replace(call, timestep=timesteps * sigma, tell=tell)
                output = policy(call)
                assert output is not None
                return sign * output

            if guidance is None:
                velocity = called("cond", velocities["cond"])
            elif batched:
                velocity = guidance.combine(*called("cond", velocities["uncond"], velocities["cond"]).chunk(2))
            else:
                cond = called("cond", velocities["cond"])
                velocity = guidance.combine(called("uncond", velocities["uncond"]), cond)
            latents = disturb(latents + (after - sigma) * velocity, step)

    return LoopSource(loop, runs, sigmas)


def _straight(latents: Tensor, sigma: float, runs: Sequence[int]) -> Tensor:
    """A velocity that is linear in sigma, with a slope of its own in each run."""
    return torch.stack([torch.full((8, 4), 1.0 + run) + run * sigma for run in runs])


def _curved(latents: Tensor, sigma: float, runs: Sequence[int]) -> Tensor:
    """A velocity that depends on where the latents are."""
    return torch.tanh(latents) * (1 + sigma) + 0.3 * latents.roll(1, -1)


def _other(latents: Tensor, sigma: float, runs: Sequence[int]) -> Tensor:
    """That of another branch."""
    return _curved(latents, sigma, runs) + 0.2 * torch.cos(3 * latents)


def _ends(source: LoopSource, predictor: SolverPredictor | None, runs: Sequence[int]) -> Tensor:
    """Sample with a predictor's formula, written out for one call a step, or in full without one."""
    latents, sigmas, history, noise = _noise(runs), source.sigmas, [], _noise(runs)
    steps = range(len(sigmas) - 1) if predictor is None else predictor.full_steps
    for number, (step, end) in enumerate(pairwise([*steps, len(sigmas) - 1])):
        seen: list[Tensor] = []

        def look(call: ModelCall, step: int = step, latents: Tensor = latents, seen: list[Tensor] = seen) -> Tensor:
            if call.step == step:
                seen.append(_curved(latents, sigmas[step], runs))
            return call.blocks()

        source.run(runs, look)
        history.insert(0, seen[0])
        latents = latents + (sigmas[end] - sigmas[step]) * seen[0]
        if predictor is not None:
            row = predictor.coefficients[number].float()
            latents = latents + row[0] * noise + sum(p * v for p, v in zip(row[1:], history, strict=False))
    return latents


def test_a_velocity_that_is_linear_in_sigma_is_met_exactly() -> None:
    fits = SolverFits(_source({"cond": _straight}), window=2, ridge=1e-12, batch=RUNS, progress=False)
    # Before the second full step nothing shows the slope.
    assert fits.psnr_db(Schedule.explicit(STEPS, [0, 1, 5, 9])) > 80
    assert fits.psnr_db(Schedule.explicit(STEPS, [0])) < 60


def test_a_fit_follows_its_own_formula_in_closed_loop() -> None:
    source = _source({"cond": _curved})
    fits = SolverFits(source, batch=RUNS, progress=False)
    predictor = fits.fit(SCHEDULE, progress=False)
    error = _ends(source, predictor, range(RUNS)) - _ends(source, None, range(RUNS))
    ratio = error.flatten(1).norm(dim=1) / _ends(source, None, range(RUNS)).flatten(1).norm(dim=1)
    assert fits.psnr_db(SCHEDULE) == pytest.approx((-20 * ratio.log10()).mean().item(), abs=0.05)
    euler = SolverPredictor(SIGMAS, SCHEDULE.full_steps)
    assert error.norm() < 0.2 * (_ends(source, euler, range(RUNS)) - _ends(source, None, range(RUNS))).norm()


def test_batches_and_processes_of_any_size_give_one_fit() -> None:
    together = fit_solver(_source({"cond": _curved}), SCHEDULE, batch=RUNS, progress=False)
    single = fit_solver(_source({"cond": _curved}), SCHEDULE, batch=1, progress=False)
    uneven = fit_solver(_source({"cond": _curved}), SCHEDULE, batch=4, progress=False)
    torch.testing.assert_close(together.coefficients, single.coefficients, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(together.coefficients, uneven.coefficients, rtol=1e-3, atol=1e-5)


def test_the_model_is_called_once_a_full_step() -> None:
    fits = SolverFits(_source({"cond": _curved}), batch=RUNS, progress=False)
    assert fits.model_calls == RUNS * STEPS
    fits.psnr_db(SCHEDULE)
    assert fits.model_calls == RUNS * (STEPS + 4)
    fits.fit(SCHEDULE, progress=False)
    assert fits.model_calls == RUNS * (STEPS + 4)
    # 0 and 3 are known, after 3 the way to 7 is another one.
    fits.psnr_db(Schedule.explicit(STEPS, [0, 3, 7, 9]))
    assert fits.model_calls == RUNS * (STEPS + 4 + 2)


def test_answers_of_one_schedule_are_kept_whatever_the_memory() -> None:
    plenty = SolverFits(_source({"cond": _curved}), batch=RUNS, progress=False)
    little = SolverFits(_source({"cond": _curved}), batch=RUNS, progress=False, memory=0)
    assert little.psnr_db(SCHEDULE) == plenty.psnr_db(SCHEDULE)
    assert little.model_calls == plenty.model_calls == RUNS * (STEPS + 4)
    other = Schedule.explicit(STEPS, [0, 2, 6, 9])
    assert little.psnr_db(other) == plenty.psnr_db(other)
    little.psnr_db(SCHEDULE)
    assert little.model_calls == RUNS * (STEPS + 4 + 3 + 3), "what other schedules answered is forgotten"


def test_a_loop_may_write_to_the_model_s_output() -> None:
    def loop(chosen: Sequence[int], policy: StepPolicy) -> None:
        latents = _noise(chosen)
        for step, (sigma, after) in enumerate(pairwise(SIGMAS)):

            def blocks(latents: Tensor = latents, sigma: float = sigma) -> Tensor:
                return -_curved(latents, sigma, chosen)

            output = policy(ModelCall(step, blocks, lambda feature: feature, latents))
            assert output is not None
            latents = latents + (after - sigma) * output.neg_()

    written = SolverFits(LoopSource(loop, RUNS, SIGMAS), batch=RUNS, progress=False)
    kept = SolverFits(_source({"cond": _curved}, sign=-1.0), batch=RUNS, progress=False)
    assert written.psnr_db(SCHEDULE) == pytest.approx(kept.psnr_db(SCHEDULE), abs=1e-3)


@pytest.mark.parametrize("guidance", [Guidance(3.0), Guidance(2.0, "norm"), Guidance(4.0, "rescale", 0.5)], ids=str)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_guidance_is_found_and_its_branches_fitted_apart(guidance: Guidance, batched: bool, sign: float) -> None:
    velocities = {"cond": _curved, "uncond": _other}
    fits = SolverFits(_source(velocities, guidance, batched=batched, sign=sign), batch=RUNS, progress=False)
    predictor = fits.fit(SCHEDULE, progress=False)
    assert predictor.is_batched is batched
    assert predictor.sign == sign
    assert predictor.branches == ("uncond", "cond")
    for each in predictor.guidance:
        assert (each.rule, each.scale) == (guidance.rule, pytest.approx(guidance.scale, rel=1e-3))
        assert each.rescale == pytest.approx(guidance.rescale, abs=1e-2)
    assert fits.psnr_db(SCHEDULE) > 25
    assert int((predictor.coefficients != 0).sum()) == 3 + 5 + 7 + 7


def test_guidance_may_change_on_the_way() -> None:
    # Wan 2.2 has another scale below a noise level.
    velocities = {"cond": _curved, "uncond": _other}
    early, late = Guidance(3.0), Guidance(5.0)

    class Changing(Guidance):
        calls = 0

        def combine(self, uncond: Tensor, cond: Tensor) -> Tensor:
            Changing.calls += 1
            return (early if (Changing.calls - 1) % STEPS < 6 else late).combine(uncond, cond)

    fits = SolverFits(_source(velocities, Changing(1.0)), batch=RUNS, progress=False)
    predictor = fits.fit(Schedule.explicit(STEPS, [0, 5, 6, 11]), progress=False)
    assert [round(each.scale, 3) for each in predictor.guidance] == [3, 3, 5, 5]


def test_held_out_runs_are_not_fitted_to() -> None:
    all_runs = SolverFits(_source({"cond": _curved}), batch=RUNS, progress=False)
    some = SolverFits(_source({"cond": _curved}), held_out=2, batch=RUNS, progress=False)
    first = fit_solver(_source({"cond": _curved}, runs=RUNS - 2), SCHEDULE, batch=RUNS, progress=False)
    torch.testing.assert_close(
        some.fit(SCHEDULE, progress=False).coefficients, first.coefficients, rtol=1e-3, atol=1e-5
    )
    assert some.psnr_db(SCHEDULE) != all_runs.psnr_db(SCHEDULE)
    some.include_held_out()
    assert some.psnr_db(SCHEDULE) == all_runs.psnr_db(SCHEDULE)


def test_cross_validation_exchanges_the_halves() -> None:
    def runs_from(first: int) -> SolverFits:
        order = SelectedRuns(_source({"cond": _curved}), [*range(first, RUNS), *range(first)])
        return SolverFits(order, held_out=RUNS // 2, batch=RUNS, progress=False)

    halves = [runs_from(first).psnr_db(SCHEDULE) for first in (0, RUNS // 2)]
    assert halves[0] != halves[1]
    assert runs_from(0).cross_validated_db(SCHEDULE) == pytest.approx(sum(halves) / 2, abs=1e-3)


def test_a_finer_target_is_met_instead() -> None:
    finer = [a + (b - a) * part / 4 for a, b in pairwise(SIGMAS) for part in range(4)] + [0.0]
    source, target = _source({"cond": _curved}), _source({"cond": _curved}, sigmas=finer)
    plain = fit_solver(source, SCHEDULE, batch=RUNS, progress=False)
    aimed = fit_solver(source, SCHEDULE, target=target, batch=RUNS, progress=False)
    end, fine = (_ends(each, None, range(RUNS)) for each in (source, target))
    errors = [[(_ends(source, each, range(RUNS)) - aim).norm() for aim in (end, fine)] for each in (plain, aimed)]
    assert errors[0][0] < errors[1][0]
    assert errors[1][1] < errors[0][1]


def _late(latents: Tensor, sigma: float, runs: Sequence[int]) -> Tensor:
    """A velocity that turns between 1 and 0.75, and shows nothing of it at 1."""
    return (1 - sigma) * max(sigma - 0.75, 0) * 40 * torch.tanh(2 * latents.roll(1, -1)) + 0.3 * latents


def test_the_first_call_is_told_a_level_that_is_still_to_come() -> None:
    heard: list[tuple[int, float]] = []
    source = _source({"cond": _late}, timesteps=1000, heard=heard)
    ahead, plain = (SolverFits(source, lookahead=lookahead, batch=RUNS, progress=False) for lookahead in (0.5, 0.0))
    heard.clear()
    assert ahead.psnr_db(SCHEDULE) > plain.psnr_db(SCHEDULE) + 3
    # Half of the way from 1 to 0.75.
    assert heard == [
        (step, pytest.approx(level))
        for first in (0.875, 1)
        for step, level in ((0, first), (3, 0.75), (6, 0.5), (9, 0.25))
    ]
    assert ahead.fit(SCHEDULE, progress=False).first_timestep == pytest.approx(875)
    assert plain.fit(SCHEDULE, progress=False).first_timestep is None
    heard.clear()
    ahead.eulers().psnr_db(SCHEDULE)
    assert heard[0] == (0, 1), "Euler's method is without it"


def test_schedules_share_a_first_call_that_is_told_the_same() -> None:
    heard: list[tuple[int, float]] = []
    fits = SolverFits(_source({"cond": _late}, timesteps=1, heard=heard), batch=RUNS, progress=False)
    heard.clear()
    for full in ([0, 3, 6], [0, 3, 8], [0, 4, 8]):
        fits.psnr_db(Schedule.explicit(STEPS, full))
    assert [step for step, _ in heard] == [0, 3, 6, 8, 0, 4, 8]


@pytest.mark.parametrize(
    ("full", "timesteps"),
    [([0, 1, 6], 1000), ([0], 1000), ([0, 3, 6], None)],
    ids=["a segment of one step", "a single segment", "a source that cannot"],
)
def test_first_calls_that_are_told_their_own_level(full: list[int], timesteps: float | None) -> None:
    fits = SolverFits(_source({"cond": _late}, timesteps=timesteps), batch=RUNS, progress=False)
    assert fits.fit(Schedule.explicit(STEPS, full), progress=False).first_timestep is None


def test_saved_and_loaded(tmp_path) -> None:
    velocities = {"cond": _curved, "uncond": _other}
    source = _source(velocities, Guidance(2.0, "norm"), timesteps=1000)
    predictor = fit_solver(source, SCHEDULE, batch=RUNS, progress=False)
    predictor.save_pretrained(tmp_path)
    loaded = load_predictor(tmp_path)
    assert isinstance(loaded, SolverPredictor)
    assert loaded.plan(SIGMAS) == predictor.plan(SIGMAS)
    assert (loaded.guidance, loaded.branches, loaded.sign) == (predictor.guidance, predictor.branches, predictor.sign)
    assert loaded.first_timestep == predictor.first_timestep and 750 < loaded.first_timestep < 1000


def _kicked(latents: Tensor, step: int) -> Tensor:
    return latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (_source({"cond": _curved}, disturb=_kicked), {}, "source must step as Euler does.*step 0"),
        (RecordedSource([[torch.ones(1)] * STEPS], SIGMAS), {}, "source must run a model with its tail"),
        (_source({"cond": _curved}), {"window": 0}, "window must be"),
        (_source({"cond": _curved}), {"ridge": 0.0}, "ridge must be"),
        (_source({"cond": _curved}), {"lookahead": 1.5}, "lookahead must be 0 to 1, got 1.5"),
        (
            _source({"cond": _curved}),
            {"target": _source({"cond": _curved}, sigmas=[1, 0.5, 0])},
            "target must pass all",
        ),
        (_source({"cond": _curved}, sigmas=[1, 0]), {}, "at least 2 steps"),
    ],
)
def test_refusals(source: LoopSource, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_solver(source, SCHEDULE, progress=False, batch=RUNS, **options)  # type: ignore[arg-type]


def _broken_at(due: int) -> Velocity:
    """Return a velocity that is not finite from a step on."""
    return lambda latents, sigma, runs: latents * (float("inf") if sigma <= SIGMAS[due] else 1.0)


@pytest.mark.parametrize(
    ("source", "step"),
    [
        (_source({"cond": _curved}, disturb=lambda x, step: x * float("nan")), 0),
        (_source({"cond": _broken_at(4)}), 4),
        (_source({"cond": _broken_at(STEPS - 1)}), STEPS - 1),
    ],
)
def test_runs_that_are_not_finite_are_refused(source: LoopSource, step: int) -> None:
    for make in (fit_solver, fit):
        with pytest.raises(FloatingPointError, match=f"model's output of step {step} are not finite"):
            make(source, SCHEDULE, progress=False, batch=RUNS)


def test_a_schedule_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="schedule must have 12 steps, got 50"):
        fit_solver(_source({"cond": _curved}), Schedule.explicit(50, [0]), progress=False, batch=RUNS)


def test_no_run_left_to_fit_to_is_refused() -> None:
    with pytest.raises(ValueError, match="held_out must leave a run"):
        SolverFits(_source({"cond": _curved}), held_out=RUNS, progress=False)


def test_tokens_that_stay_do_not_count() -> None:
    def half(latents: Tensor, sigma: float, runs: Sequence[int]) -> Tensor:
        return _curved(latents, sigma, runs)

    def loop(chosen: Sequence[int], policy: StepPolicy) -> None:
        latents, stay = _noise(chosen), 5 * torch.ones(len(chosen), 3, 4)
        for step, (sigma, after) in enumerate(pairwise(SIGMAS)):
            given = torch.cat([latents, stay], 1)
            call = ModelCall(step, lambda given=given, sigma=sigma: half(given, sigma, chosen), lambda x: x, given)
            output = policy(call)
            assert output is not None
            latents = latents + (after - sigma) * output[:, :8]

    kept = fit_solver(LoopSource(loop, RUNS, SIGMAS), SCHEDULE, batch=RUNS, progress=False)
    alone = fit_solver(_source({"cond": _curved}), SCHEDULE, batch=RUNS, progress=False)
    torch.testing.assert_close(kept.coefficients, alone.coefficients, rtol=1e-3, atol=1e-5)


def test_predictors_of_branches_take_the_place_of_a_single_one(tmp_path: Path) -> None:
    single = fit_solver(_source({"cond": _curved}), SCHEDULE, batch=RUNS, progress=False)
    save_predictors({"cond": single}, tmp_path)
    assert load_predictor(tmp_path).schedule == SCHEDULE
    save_predictors({"cond": single, "uncond": single}, tmp_path)
    with pytest.raises(FileNotFoundError, match="holds the branches cond, uncond: load each"):
        load_predictor(tmp_path)
    assert load_predictor(tmp_path / "uncond").schedule == SCHEDULE

"""The search for full steps, budgets, the curve, and the judges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image

import lesa_kernels as lesa
from lesa_kernels.training import (
    Evaluator,
    SelectedRuns,
    SolverFits,
    even_schedules,
    fewest_calls,
    fit,
    plot_curve,
    quality_curve,
    search_schedule,
)
from lesa_kernels.trajectories import ONLY_BRANCH, LoopSource, ModelCall, RecordedSource, StepPolicy

STEPS = 20
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
# Denser towards the end.
CURVED = [(1 - step / STEPS) ** 0.5 for step in range(STEPS + 1)]
WANTED = (0, 5, 6, 12)


class _Counting:
    """Judges by the distance from the wanted full steps; more calls are better; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def __call__(self, schedule: lesa.Schedule) -> float:
        self.asked.append(schedule.full_steps)
        full = schedule.full_steps
        distance = sum(abs(a - b) for a, b in zip(full, WANTED, strict=False))
        return 10.0 * len(full) - distance


def test_even_schedules_have_segments_of_one_length_but_for_the_last() -> None:
    between, quarter, by_step, by_sigma = even_schedules(CURVED, 4)
    # 20 steps by 3 2/3: 5.45, 10.9, 16.4.
    assert by_step.full_steps == (0, 5, 11, 16)
    assert by_sigma == lesa.Schedule.uniform_in_sigma(CURVED, 4)
    assert between.full_steps == (0, 7, 13, 18)
    assert quarter.full_steps == (0, 8, 15, 19)
    assert even_schedules(CURVED, STEPS) == [lesa.Schedule(STEPS, tuple(range(STEPS)))], "each once"
    assert even_schedules(CURVED, 1) == [lesa.Schedule(STEPS, (0,))]
    with pytest.raises(ValueError, match="calls must be at most 20"):
        even_schedules(SIGMAS, 21)


def test_no_call_is_spent_on_a_last_step_of_no_length() -> None:
    sigmas = [*SIGMAS[:-1], 0.049]
    assert all(schedule.full_steps[-1] < STEPS - 1 for schedule in even_schedules(sigmas, 5))


def test_the_search_walks_to_the_best_schedule() -> None:
    judge = _Counting()
    found = search_schedule(judge, even_schedules(CURVED, 4), placements=200, progress=False)
    assert found.schedule.full_steps == WANTED
    assert found.psnr_db == 40.0
    assert found.placements == len(judge.asked) == len(set(judge.asked)), "nothing is tried twice"


def test_the_search_keeps_to_its_placements_and_is_no_worse_than_its_starts() -> None:
    far, near = lesa.Schedule(STEPS, (0, 17, 18, 19)), lesa.Schedule(STEPS, (0, 5, 7, 12))
    judge = _Counting()
    found = search_schedule(judge, [far, near], placements=5, progress=False)
    assert judge.asked[:2] == [far.full_steps, near.full_steps]
    assert found.placements == len(judge.asked) == 5
    assert found.psnr_db >= judge(near)
    assert search_schedule(judge, [far, near], placements=2, progress=False).schedule == near


def test_searches_repeat() -> None:
    judges = _Counting(), _Counting()
    for judge in judges:
        search_schedule(judge, even_schedules(CURVED, 4), placements=20, progress=False)
    assert judges[0].asked == judges[1].asked


def test_the_search_ends_where_nothing_is_left_to_try() -> None:
    start = lesa.Schedule(3, (0, 1))
    found = search_schedule(_Counting(), start, placements=60, progress=False)
    assert found.placements == 2
    assert search_schedule(_Counting(), lesa.Schedule(3, (0,)), progress=False).placements == 1


@pytest.mark.parametrize(
    ("start", "placements", "message"),
    [
        ([lesa.Schedule(STEPS, (0, 1)), lesa.Schedule(STEPS, (0, 2))], 1, "got 1 placements for 2 starts"),
        ([], 3, "start not empty"),
        ([lesa.Schedule(STEPS, (0, 1)), lesa.Schedule(STEPS, (0,))], 9, "start must hold schedules of as many steps"),
    ],
)
def test_search_refusals(start: list[lesa.Schedule], placements: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search_schedule(_Counting(), start, placements=placements, progress=False)


def test_a_judge_that_says_no_number_is_named() -> None:
    with pytest.raises(TypeError, match="what judge returns must be a number, got None"):
        search_schedule(lambda schedule: None, lesa.Schedule(STEPS, (0, 5)), progress=False)  # type: ignore[arg-type, return-value]


def test_the_fewest_calls_that_reach_a_bound() -> None:
    judge = _Counting()
    found = fewest_calls(judge, SIGMAS, 39.0, placements=200, progress=False)
    assert found.schedule.full_steps == WANTED, "evenly spaced more are needed, the search finds that 4 are enough"
    assert judge(even_schedules(SIGMAS, 4)[0]) < 39.0
    with pytest.raises(ValueError, match="psnr_db must be within reach: 19 calls give"):
        fewest_calls(judge, SIGMAS, 1e6, progress=False)


def test_a_curve_is_searched_from_what_was_found_for_fewer_calls() -> None:
    judge = _Counting()
    curve = quality_curve(judge, CURVED, [5, 4], placements=100, progress=False)
    assert list(curve) == [4, 5]
    assert curve[4].schedule.full_steps == WANTED
    starts = [asked for asked in judge.asked if len(asked) == 5]
    assert starts[0] == (0, 4, 6, 8, 14), "the four segments of the one before, spread to five"


def test_a_curve_of_one_placement_each_is_even_or_like_a_given_one() -> None:
    judge = _Counting()
    even = quality_curve(judge, CURVED, [3, 4, 6], placements=1, progress=False)
    assert [each.schedule for each in even.values()] == [even_schedules(CURVED, count)[0] for count in (3, 4, 6)]
    like = quality_curve(judge, CURVED, [2, 4, 8], like=lesa.Schedule(STEPS, WANTED), placements=1, progress=False)
    assert like[4].schedule.full_steps == WANTED
    assert like[2].schedule.full_steps == (0, 6)
    # Two in each segment; where it is of one step, the next ones give way.
    assert like[8].schedule.full_steps == (0, 2, 5, 6, 7, 9, 12, 16)


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    file = plot_curve({"one": {4: 30.0, 3: 20.0}, "another": {3: 10.0}}, tmp_path / "curve.png", chosen=3)
    with Image.open(file) as image:
        assert image.size == (910, 520)
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def _source(branch: str = ONLY_BRANCH, runs: int = 3) -> LoopSource:
    """dx/dsigma = feature, which is cubic in sigma and differs from run to run."""

    def loop(chosen: Sequence[int], policy: StepPolicy) -> None:
        latents = torch.ones(len(chosen), 4)
        scale = torch.tensor([1.0 + run for run in chosen])[:, None]
        for step in range(STEPS):
            feature = scale * SIGMAS[step] ** 3 * torch.arange(1.0, 5.0)
            output = policy(ModelCall(step, lambda feature=feature: feature, lambda feature: feature, latents, branch))  # type: ignore[misc]
            assert output is not None
            latents = latents + (SIGMAS[step + 1] - SIGMAS[step]) * output

    return LoopSource(loop, runs, SIGMAS)


def test_the_evaluator_measures_the_final_latents() -> None:
    evaluator = Evaluator(_source(), batch=2, progress=False)
    schedule = lesa.Schedule.explicit(STEPS, (0, 1, 2, 3, 10))
    exact = evaluator(lesa.TaylorSeer(3), schedule)
    rough = evaluator(lesa.Reuse(), schedule)
    assert exact > rough
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
    assert rough == pytest.approx(-20 * torch.stack(error).log10().mean().item(), abs=1e-3)


def test_the_evaluator_follows_the_only_branch() -> None:
    schedule = lesa.Schedule.explicit(STEPS, (0, 1, 2, 3, 10))
    known, other = (
        Evaluator(_source(branch), progress=False)(lesa.Reuse(), schedule) for branch in ("cond", "cond_uncond")
    )
    assert other == known < 60


def test_an_evaluator_needs_a_model() -> None:
    recorded = RecordedSource([[torch.ones(2)] * STEPS], SIGMAS)
    with pytest.raises(ValueError, match="this one holds features only"):
        Evaluator(recorded, progress=False)


def test_selected_runs_are_those_of_their_source() -> None:
    source, schedule = _source(), lesa.Schedule.explicit(STEPS, (0, 4))
    of_each = [
        Evaluator(SelectedRuns(source, [run]), progress=False)(lesa.Reuse(), schedule) for run in range(len(source))
    ]
    assert len(set(of_each)) == 3
    both = Evaluator(SelectedRuns(source, [2, 0]), batch=2, progress=False)(lesa.Reuse(), schedule)
    assert both == pytest.approx((of_each[0] + of_each[2]) / 2, abs=1e-4)
    with pytest.raises(ValueError, match=r"runs\[1\] must be at most 2, got 3"):
        SelectedRuns(source, [0, 3])


def test_a_fit_through_the_tail_is_judged_on_other_runs() -> None:
    source = _source(runs=4)
    fitted_to, others = SelectedRuns(source, [0, 1]), SelectedRuns(source, [2, 3])
    evaluator = Evaluator(others, batch=2, progress=False)

    def judge(schedule: lesa.Schedule) -> float:
        return evaluator(fit(fitted_to, schedule, rounds=2, batch=2, progress=False), schedule)

    start = lesa.Schedule.explicit(STEPS, (0, 1, 2))
    found = search_schedule(judge, start, placements=6, progress=False)
    assert found.psnr_db > judge(start)


def _turning(runs: int = 6) -> LoopSource:
    """A flow that turns latents around in a plane, faster late, with a speed of each run's own."""

    def loop(chosen: Sequence[int], policy: StepPolicy) -> None:
        latents = torch.stack([torch.randn(8, 2, generator=torch.Generator().manual_seed(run)) for run in chosen])
        for step in range(STEPS):
            turn = (1 + 4 * (1 - SIGMAS[step]) ** 2) * torch.tensor([1.0 + run / runs for run in chosen])[:, None, None]
            velocity = turn * latents.flip(-1) * torch.tensor([1.0, -1.0])
            output = policy(ModelCall(step, lambda velocity=velocity: velocity, lambda feature: feature, latents))  # type: ignore[misc]
            assert output is not None
            latents = latents + (SIGMAS[step + 1] - SIGMAS[step]) * output

    return LoopSource(loop, runs, SIGMAS)


def test_the_learned_solver_is_searched_for_on_held_out_runs_and_calls_are_shared() -> None:
    fits = SolverFits(_turning(), held_out=3, batch=6, progress=False)
    starts = even_schedules(fits.sigmas, 5)
    before = fits.model_calls
    found = search_schedule(fits.psnr_db, starts, placements=40, progress=False)
    assert found.psnr_db > max(map(fits.psnr_db, starts)) + 1
    assert fits.model_calls - before < 0.7 * found.placements * 5 * 6, "placements that begin alike share answers"


def test_euler_alone_is_what_the_solver_is_without_coefficients() -> None:
    fits = SolverFits(_turning(), held_out=3, batch=6, progress=False)
    schedule = lesa.Schedule.explicit(STEPS, (0, 4, 9, 14))
    evaluator = Evaluator(SelectedRuns(_turning(), [3, 4, 5]), batch=3, progress=False)
    # The feature is the output here, so to reuse it is Euler's method with long steps.
    assert fits.eulers().psnr_db(schedule) == pytest.approx(evaluator(lesa.Reuse(), schedule), abs=1e-3)
    assert fits.psnr_db(schedule) > fits.eulers().psnr_db(schedule) + 3

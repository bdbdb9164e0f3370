"""Per-step coefficients: what they forecast, when they decline, and that they survive a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import lesa_kernels as lesa
from lesa_kernels.plan import Row

STEPS = 20
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
SCHEDULE = lesa.Schedule.uniform_in_sigma(SIGMAS, 6)


def _of_taylor() -> lesa.LinearPredictor:
    rule = lesa.TaylorSeer(2).rows(SIGMAS)
    rows = {}
    for step in set(range(STEPS)) - set(SCHEDULE.full_steps):
        row = rule(step, [full for full in SCHEDULE.full_steps if full < step])
        assert row is not None
        rows[step] = row
    return lesa.LinearPredictor.from_rows(SIGMAS, SCHEDULE, rows, 3)


def test_coefficients_of_taylor_give_the_plan_of_taylor() -> None:
    assert _of_taylor().plan(SIGMAS) == lesa.TaylorSeer(2).plan(SIGMAS, SCHEDULE)


def test_the_own_schedule_is_the_default_and_others_run_full_where_features_are_missing() -> None:
    predictor = _of_taylor()
    assert predictor.schedule == SCHEDULE
    assert predictor.plan(SIGMAS).full_steps == SCHEDULE.full_steps
    other = lesa.Schedule.explicit(STEPS, {*SCHEDULE.full_steps} - {SCHEDULE.full_steps[2]})
    assert SCHEDULE.full_steps[2] in predictor.plan(SIGMAS, other).full_steps
    late = predictor.plan(SIGMAS, first_step=1)
    assert late.full_steps == (*range(1, SCHEDULE.full_steps[3] + 1), *SCHEDULE.full_steps[4:])


def test_a_predictor_that_was_made_for_no_schedule_asks_for_one() -> None:
    with pytest.raises(ValueError, match="schedule must be given: this TaylorSeer was not made for one"):
        lesa.TaylorSeer().plan(SIGMAS)


def test_over_all_reads_forecasts_too() -> None:
    rows = {step: Row({step - 2: -1.0, step - 1: 2.0}, 0.5) for step in (2, 3)}
    predictor = lesa.LinearPredictor.from_rows([1.0, 0.9, 0.8, 0.7, 0.0], lesa.Schedule(4, (0, 1)), rows, 2, True)
    session = lesa.Session(predictor.plan(predictor.trained_sigmas))
    first, second = torch.tensor([1.0]), torch.tensor([3.0])
    session.push(0, first)
    session.push(1, second)
    third = 2 * second - first + 0.5
    assert torch.equal(session.forecast(2), third)
    assert torch.equal(session.forecast(3), 2 * third - second + 0.5)


def test_a_step_without_coefficients_runs_full() -> None:
    predictor = _of_taylor()
    predictor.coefficients[7] = torch.nan
    assert predictor.plan(SIGMAS).full_steps == tuple(sorted({*SCHEDULE.full_steps, 7}))


def test_a_folder_keeps_every_kind_of_predictor(tmp_path: Path) -> None:
    linear = _of_taylor()
    linear.save_pretrained(tmp_path / "linear")
    learned = lesa.LesaPredictor(STEPS, ((0.0, 2),), 8)
    learned.trained_sigmas, learned.trained_schedule = SIGMAS, lesa.Schedule.explicit(STEPS, (0, 1, 9))
    learned.save_pretrained(tmp_path / "lesa")
    loaded = lesa.load_predictor(tmp_path / "linear")
    assert isinstance(loaded, lesa.LinearPredictor)
    assert loaded.plan(SIGMAS) == linear.plan(SIGMAS)
    again = lesa.load_predictor(tmp_path / "lesa")
    assert isinstance(again, lesa.LesaPredictor)
    assert again.plan(SIGMAS) == learned.plan(SIGMAS)
    assert again.schedule == learned.trained_schedule


def test_folders_that_hold_no_predictor_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        lesa.load_predictor(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"predictor": "Oracle"}))
    with pytest.raises(
        ValueError, match="predictor must be one of LesaPredictor, LinearPredictor, SolverPredictor, got 'Oracle'"
    ):
        lesa.load_predictor(tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="must be a JSON object"):
        lesa.load_predictor(tmp_path)


def test_other_sigmas_are_refused() -> None:
    moved = [sigma**1.1 for sigma in SIGMAS]
    with pytest.raises(ValueError, match="trained for other sigmas"):
        _of_taylor().plan(moved)
    assert _of_taylor().plan(moved, on_other_sigmas="adapt").full_steps == SCHEDULE.full_steps
    with pytest.raises(ValueError, match="sigmas must hold 21 values, got 3"):
        _of_taylor().plan([1.0, 0.5, 0.0], lesa.Schedule(2, (0,)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.5, 1.0], (0,)), "falling"),
        ((SIGMAS, (1,)), "start with step 0"),
        ((SIGMAS, (0,), 0), "window must be 1 to 64"),
        ((SIGMAS, (0,), 65), "window must be 1 to 64"),
    ],
)
def test_arguments_are_checked(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lesa.LinearPredictor(*arguments)  # type: ignore[arg-type]


def test_rows_outside_the_window_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows\[7\] must read features of steps"):
        lesa.LinearPredictor.from_rows(SIGMAS, SCHEDULE, {7: Row({5: 1.0})}, 3)


def test_hermite_polynomials_take_the_place_of_powers() -> None:
    # Three steps after full steps 0 and 2, second differences: H_1(x) = 2x, H_2(x) = 4x^2 - 2, at x = 3c.
    nodes, distance, c = (0, 1, 2), 3.0, 0.5
    plan = lesa.HiCache(2, c).plan(SIGMAS, lesa.Schedule.explicit(STEPS, nodes))
    launch = plan.segments[2].launches[0]
    row = dict(zip(launch.inputs, launch.coefficients[launch.steps.index(5)], strict=True))
    first, second = c * 2 * c * distance, c**2 * (4 * (c * distance) ** 2 - 2) / 2
    expected = {2: 1 + first + second, 1: -first - 2 * second, 0: second}
    assert row == pytest.approx(expected)


def test_hermite_checks_its_contraction() -> None:
    with pytest.raises(ValueError, match="contraction must be greater than 0"):
        lesa.HiCache(contraction=0.0)

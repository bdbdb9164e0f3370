"""Full steps that are compared with what they would have been forecast."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lesa_kernels import LesaPredictor, Plan, Predictor, Reuse, Schedule, Session, TaylorSeer
from lesa_kernels.plan import Row, RowRule

STEPS = 20
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
SPARSE = Schedule.explicit(STEPS, [0, 1, 5, 6, 11, 17])
PREDICTORS = {
    "reuse": Reuse(),
    "taylor": TaylorSeer(2),
    "lesa": LesaPredictor(STEPS, stages=((0.5, 2), (0.0, 3))),
}


def _features(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    drift, noise = torch.randn(2, 2, 7, 12)
    return [(drift * (1 + step / 10) + 0.1 * noise * torch.randn(())).to(dtype) for step in range(STEPS)]


def _run(run: Session, features: Sequence[Tensor]) -> list[Tensor]:
    results = []
    for step in range(run.plan.first_step, run.plan.num_steps):
        if run.plan.is_full(step):
            run.push(step, features[step])
            results.append(features[step])
        else:
            results.append(run.forecast(step).clone())
    return results


def _expected(predictor: Predictor, plan: Plan, results: Sequence[Tensor]) -> dict[int, float]:
    """The errors by their definition, of forecasts from the features of a run."""
    rule, expected = predictor.rows(SIGMAS), {}
    for step in plan.checked_steps:
        row = rule(step, [full for full in plan.full_steps if full < step])
        assert row is not None
        terms = [coefficient * results[source - plan.first_step].double() for source, coefficient in row.terms.items()]
        feature = results[step - plan.first_step].double()
        forecast = torch.stack(terms).sum(0) + row.offset
        expected[step] = ((forecast - feature).abs().mean() / feature.abs().mean()).item()
    return expected


@pytest.mark.parametrize("chunk", [None, 1, 3])
@pytest.mark.parametrize("name", PREDICTORS)
def test_errors_are_those_of_the_definition_and_forecasts_stay_the_same(name: str, chunk: int | None) -> None:
    predictor, features = PREDICTORS[name], _features()
    plan = predictor.plan(SIGMAS, SPARSE, chunk=chunk, check_every=1)
    run = Session(plan)
    results = _run(run, features)
    assert all(map(torch.equal, results, _run(Session(predictor.plan(SIGMAS, SPARSE, chunk=chunk)), features)))
    expected = _expected(predictor, plan, results)
    assert {5, 6, 11, 17} <= expected.keys() == run.errors.keys()
    for step, error in run.errors.items():
        assert error.item() == pytest.approx(expected[step], rel=1e-4, abs=1e-6)


def test_each_nth_full_step_is_checked() -> None:
    assert Reuse().plan(SIGMAS, SPARSE, check_every=1).checked_steps == (1, 5, 6, 11, 17)
    assert Reuse().plan(SIGMAS, SPARSE, check_every=2).checked_steps == (5, 11)
    assert Reuse().plan(SIGMAS, SPARSE, check_every=9).checked_steps == ()
    assert Reuse().plan(SIGMAS, SPARSE, first_step=8, check_every=1).checked_steps == (11, 17)
    assert "checked steps: 5 11\n" in Reuse().plan(SIGMAS, SPARSE, check_every=2).describe()


def test_steps_that_are_full_for_want_of_a_history_are_not_checked() -> None:
    plan = LesaPredictor(STEPS, stages=((0.0, 4),)).plan(SIGMAS, Schedule.explicit(STEPS, [0, 1, 9]), check_every=1)
    assert plan.full_steps == (0, 1, 2, 3, 9) and plan.checked_steps == (9,)


def test_errors_of_a_small_history_are_nearly_those_of_a_plain_one() -> None:
    features, plan = _features(), TaylorSeer(1).plan(SIGMAS, SPARSE, check_every=1)
    runs = [Session(plan), Session(plan, history_dtype=torch.bfloat16)]
    for run in runs:
        _run(run, features)
    plain, small = (run.errors for run in runs)
    assert plain.keys() == small.keys()
    for step in plain:
        assert 0 < abs(small[step] - plain[step]) < 0.01 * (1 + 2 * plan.full_steps.index(step))


def test_a_run_of_full_steps_alone_can_be_checked() -> None:
    every, features = Schedule.explicit(STEPS, range(STEPS)), _features()
    run = Session(Reuse().plan(SIGMAS, every, check_every=1), history_dtype=torch.bfloat16)
    _run(run, features)
    assert run.errors.keys() == set(range(1, STEPS))


def test_a_new_run_begins_without_errors() -> None:
    run, features = Session(Reuse().plan(SIGMAS, SPARSE, check_every=1)), _features()
    _run(run, features)
    kept = run.errors
    run.push(0, features[0])
    assert run.errors == {} and len(kept) == 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_features_of_other_dtypes_are_checked(dtype: torch.dtype) -> None:
    run = Session(Reuse().plan(SIGMAS, SPARSE, check_every=1))
    _run(run, _features(dtype))
    wide = Session(Reuse().plan(SIGMAS, SPARSE, check_every=1))
    _run(wide, _features(torch.float64))
    for step, error in run.errors.items():
        assert error.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert error.item() == pytest.approx(wide.errors[step].item(), abs=2e-3)


class _Broken(Predictor):
    def __init__(self, row: Row) -> None:
        self.row = row

    def rows(self, sigmas: Sequence[float]) -> RowRule:
        return lambda step, full_steps: self.row if step == 5 else Row({step - 1: 1.0})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row({}), "the row of step 5 must read at least one feature"),
        (Row({4: float("nan")}), "the row of step 5 must be finite"),
        (Row({5: 1.0}), "the row of step 5 must read steps 0 to 4, got step 5"),
    ],
)
def test_rows_of_checks_are_checked_as_those_of_forecasts(row: Row, message: str) -> None:
    _Broken(row).plan(SIGMAS, SPARSE)
    with pytest.raises(ValueError, match=message):
        _Broken(row).plan(SIGMAS, SPARSE, check_every=1)


def test_a_check_reads_no_more_than_a_launch_can() -> None:
    steps = 80
    rule = type("Mean", (Predictor,), {"rows": lambda self, sigmas: lambda step, full: Row(dict.fromkeys(full, 0.1))})
    sigmas = [1 - step / steps for step in range(steps + 1)]
    with pytest.raises(ValueError, match="a check reads at most 64 features, got 65 for step 65"):
        rule().plan(sigmas, Schedule.explicit(steps, range(steps)), check_every=1)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("1", TypeError)])
def test_check_every_must_be_a_count(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"check_every must be (at least 1|an int or None), got"):
        Reuse().plan(SIGMAS, SPARSE, check_every=value)  # type: ignore[arg-type]

"""Spectrum's regression on Chebyshev polynomials, and its schedule."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.polynomial import chebyshev

import lesa_kernels as lesa
from lesa_kernels import Schedule, Spectrum
from lesa_kernels.plan import Row
from lesa_kernels.predictors.taylor import taylor_weights

SIGMAS = np.linspace(1.0, 0.0, 51).tolist()
PUBLISHED = Schedule.growing(50, growth=3.0)


def _row(predictor: Spectrum, step: int, full_steps: tuple[int, ...] = PUBLISHED.full_steps) -> Row:
    row = predictor.rows(SIGMAS)(step, [full for full in full_steps if full < step])
    assert row is not None
    return row


def _forecasts() -> list[int]:
    return [step for step in range(50) if step not in PUBLISHED.full_steps]


@pytest.mark.parametrize("free_constant", [False, True])
@pytest.mark.parametrize("step", [5, 12, 49])
def test_a_row_is_the_value_of_the_penalized_regression(step: int, free_constant: bool) -> None:
    nodes = [full for full in PUBLISHED.full_steps if full < step]
    values = np.random.default_rng(0).normal(size=len(nodes))
    design = chebyshev.chebvander(np.array(nodes) / 25 - 1, 4)
    penalty = np.sqrt(0.1) * np.eye(5)[int(free_constant) :]
    found = np.linalg.lstsq(np.vstack([design, penalty]), np.append(values, np.zeros(len(penalty))), rcond=None)[0]
    row = _row(Spectrum(free_constant=free_constant), step)
    got = sum(row.terms[node] * value for node, value in zip(nodes, values, strict=True))
    assert got == pytest.approx(chebyshev.chebval(step / 25 - 1, found))


def test_as_published_a_constant_feature_is_forecast_too_small() -> None:
    sums = [sum(_row(Spectrum(), step).terms.values()) for step in _forecasts()]
    assert (min(sums), max(sums)) == pytest.approx((0.654, 0.956), abs=1e-3)
    assert sum(sums) / len(sums) == pytest.approx(0.850, abs=1e-3)


@given(st.floats(0, 1), st.sampled_from(["step", "sigma"]), st.integers(0, 6))
def test_with_a_free_constant_a_constant_feature_stays(weight: float, variable: str, degree: int) -> None:
    predictor = Spectrum(degree, weight=weight, variable=variable, free_constant=True)  # type: ignore[arg-type]
    for step in _forecasts():
        assert sum(_row(predictor, step).terms.values()) == pytest.approx(1)


@pytest.mark.parametrize("variable", ["step", "sigma"])
def test_a_small_ridge_reproduces_polynomials(variable: str) -> None:
    predictor = Spectrum(ridge=1e-9, variable=variable)  # type: ignore[arg-type]
    row = _row(predictor, 21)
    assert sum(weight * (source / 50) ** 4 for source, weight in row.terms.items()) == pytest.approx(0.42**4, abs=1e-4)


def test_the_rest_of_the_weight_is_a_straight_line() -> None:
    whole, half, line = (_row(Spectrum(weight=weight), 40) for weight in (1.0, 0.5, 0.0))
    for source in whole.terms:
        assert half.terms[source] == pytest.approx((whole.terms[source] + line.terms[source]) / 2)
    assert [line.terms[19], line.terms[30]] == taylor_weights([19, 30], 40)
    assert _row(Spectrum(weight=0.0), 3, (0,)).terms == {0: 1.0}


def test_a_plan_reads_the_last_64_full_steps() -> None:
    sigmas = np.linspace(1.0, 0.0, 201).tolist()
    plan = lesa.Spectrum().plan(sigmas, Schedule.explicit(200, range(100)))
    assert plan.segments[-1].launches[0].inputs == tuple(range(36, 100))


def test_published_schedules() -> None:
    assert PUBLISHED.full_steps == (0, 1, 2, 3, 4, 6, 11, 19, 30, 44)
    assert len(Schedule.growing(50).full_steps) == 14
    assert Schedule.growing(50, 2, 0, 1).full_steps == tuple(range(0, 50, 2))
    assert Schedule.growing(3).full_steps == (0, 1, 2)


@given(st.integers(1, 60), st.floats(1, 5), st.floats(0, 8), st.integers(1, 8))
def test_growing_intervals_by_the_published_words(num_steps: int, interval: float, growth: float, warmup: int) -> None:
    interval, growth = round(interval, 2), round(growth, 2)
    full, window, forecasts = [], interval, 0
    for step in range(num_steps):
        due = step < warmup
        if not due and (forecasts + 1) % int(window) == 0:
            due, window = True, round(window + growth, 3)
        forecasts = 0 if due else forecasts + 1
        full += [step] * due
    assert Schedule.growing(num_steps, interval, growth, warmup).full_steps == tuple(full)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Spectrum(degree=17), ValueError, "degree must be at most 16, got 17"),
        (lambda: Spectrum(ridge=0), ValueError, "ridge must be greater than 0, got 0"),
        (lambda: Spectrum(weight=1.5), ValueError, "weight must be 0 to 1, got 1.5"),
        (lambda: Spectrum(weight="all"), TypeError, "weight must be a number, got 'all'"),  # type: ignore[arg-type]
        (lambda: Spectrum(variable="time"), ValueError, 'variable must be "step" or "sigma"'),  # type: ignore[arg-type]
        (lambda: Schedule.growing(50, 0.5), ValueError, "interval must be at least 1, got 0.5"),
        (lambda: Schedule.growing(50, growth=-1), ValueError, "growth must be at least 0, got -1"),
        (lambda: Schedule.growing(50, warmup=0), ValueError, "warmup must be at least 1, got 0"),
    ],
)
def test_errors(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]

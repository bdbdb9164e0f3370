"""The forecasters that need no training: what each must reproduce, and that every one serves any schedule."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.quality.forecasters import (
    OWN_SCHEDULES,
    TRAINING_FREE,
    AdamsBashforth,
    Barycentric,
    FoCa,
    Zeus,
    barycentric_weights,
    spectrum_schedule,
)
from lesa_kernels.plan import Row
from lesa_kernels.predictors import Predictor
from lesa_kernels.schedule import Schedule

SIGMAS = [1 - (step / 50) ** 1.3 for step in range(50)] + [0.0]
SCHEDULE = Schedule.explicit(50, (0, 4, 10, 15, 24, 31, 40))


def _row(predictor: Predictor, step: int) -> Row:
    row = predictor.rows(SIGMAS)(step, [full for full in SCHEDULE.full_steps if full < step])
    assert row is not None
    return row


def _value(row: Row, values: list[float]) -> float:
    return sum(weight * values[source] for source, weight in row.terms.items())


@pytest.mark.parametrize("name", TRAINING_FREE)
def test_every_forecaster_serves_any_schedule_and_all_but_spectrum_keep_a_constant(name: str) -> None:
    plan = TRAINING_FREE[name].plan(SIGMAS, SCHEDULE)
    assert plan.full_steps == SCHEDULE.full_steps
    sums = [sum(row) for segment in plan.segments for launch in segment.launches for row in launch.coefficients]
    shrinks = name in ("Spectrum", "Spectrum, weight 0.5")
    assert all(math.isclose(each, 1.0) for each in sums) != shrinks


@pytest.mark.parametrize(("degree", "nodes"), [(0, 1), (1, 2), (1, 4), (2, 3), (3, 4)])
def test_barycentric_rows_are_exact_on_polynomials_of_their_degree(degree: int, nodes: int) -> None:
    powers = [sigma**degree for sigma in SIGMAS]
    assert _value(_row(Barycentric(degree, nodes), 37), powers) == pytest.approx(powers[37])


@pytest.mark.parametrize("degree", range(5))
def test_barycentric_weights_blend_the_polynomials_through_neighbours(degree: int) -> None:
    nodes, values, position = np.array([1.0, 0.8, 0.65, 0.4, 0.3]), np.array([1.0, -2.0, 0.5, 3.0, 1.5]), 0.1
    groups = [slice(first, first + degree + 1) for first in range(len(nodes) - degree)]
    shares = [(-1) ** group.start / np.prod(position - nodes[group]) for group in groups]
    polynomials = [np.polyval(np.polyfit(nodes[group], values[group], degree), position) for group in groups]
    got = np.dot(barycentric_weights(nodes.tolist(), degree, position), values)
    assert got == pytest.approx(np.dot(shares, polynomials) / sum(shares))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_adams_bashforth_integrates_polynomials_below_its_order(order: int) -> None:
    velocities = [sigma ** (order - 1) for sigma in SIGMAS]
    step = 37
    integral = (SIGMAS[step + 1] ** order - SIGMAS[step] ** order) / order
    taken = (SIGMAS[step + 1] - SIGMAS[step]) * _value(_row(AdamsBashforth(order), step), velocities)
    assert taken == pytest.approx(integral)


def test_adams_bashforth_has_its_textbook_coefficients_at_equal_steps() -> None:
    rule = AdamsBashforth(3).rows([1.0, 0.75, 0.5, 0.25, 0.0])
    row = rule(2, [0, 1, 2])
    assert row is not None
    assert [row.terms[step] for step in (2, 1, 0)] == pytest.approx([23 / 12, -16 / 12, 5 / 12])


def test_foca_is_exact_on_what_is_straight_in_steps_and_pulled_by_the_full_features_slope() -> None:
    for step in range(5, 50):
        if step not in SCHEDULE.full_steps:
            terms = _row(FoCa(), step).terms
            assert sum(weight * source for source, weight in terms.items()) == pytest.approx(step)
    values = dict.fromkeys(range(50), 0.0) | {24: 7.0}
    # 7 at step 24, 0 before: BDF2 goes on by 7, the full features by 7 / 9.
    assert sum(w * values[source] for source, w in _row(FoCa(), 25).terms.items()) == pytest.approx(7 + (7 + 7 / 9) / 2)


def test_zeus_takes_turns() -> None:
    assert [_row(Zeus(), step).terms for step in (25, 26, 27)] == [{24: 2.0, 15: -1.0}, {24: 1.0}, {24: 2.0, 15: -1.0}]
    assert _row(Zeus(), 1).terms == {0: 1.0}


def test_spectrum_s_schedules_are_the_published_ones_where_there_are_any() -> None:
    assert spectrum_schedule(50, 10) == Schedule.growing(50, growth=3.0)
    assert spectrum_schedule(50, 14) == Schedule.growing(50, growth=0.75)
    assert {len(rule(50, 8).full_steps) for rule in OWN_SCHEDULES.values()} == {8}
    with pytest.raises(ValueError, match="must be what some growth gives at 50 steps, got 5"):
        spectrum_schedule(50, 5)

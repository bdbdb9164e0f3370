"""Schedules: the published rule, explicit steps, uniform in sigma."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lesa_kernels import Schedule


def test_published_examples() -> None:
    seven = Schedule.interval(num_steps=50, interval=7, warmup=3)
    assert seven.full_steps == (0, 1, 2, 3, 9, 16, 23, 30, 37, 44)
    assert seven.speedup == 5.0
    assert len(Schedule.interval(50, 10).full_steps) == 8


@given(st.integers(1, 80), st.integers(1, 12), st.integers(1, 8))
def test_interval_rule_by_its_words(num_steps: int, interval: int, warmup: int) -> None:
    full = set(Schedule.interval(num_steps, interval, warmup).full_steps)
    counter = 0
    for step in range(num_steps):
        if step < warmup or counter == interval - 1:
            counter, expected = 0, True
        else:
            counter, expected = counter + 1, step == 3
        assert (step in full) == expected


def test_uniform_in_sigma_under_flux_s_time_shift(flux_sigmas: list[float]) -> None:
    assert Schedule.uniform_in_sigma(flux_sigmas, 10).full_steps == (0, 14, 23, 30, 35, 39, 42, 45, 47, 49)


@pytest.mark.parametrize(("steps", "full"), [(4, (0, 2, 3)), (8, (0, 5, 7))])
def test_uniform_in_sigma_finds_the_best_three_of_few_steps(steps: int, full: tuple[int, ...]) -> None:
    # Of all choices these came closest to all steps on the demo's model, by TaylorSeer of any order.
    shift = math.exp(1.15)
    sigmas = [shift / (shift + steps / (steps - step) - 1) for step in range(steps)] + [0.0]
    assert Schedule.uniform_in_sigma(sigmas, 3).full_steps == full


def _spans(sigmas: list[float], full: tuple[int, ...]) -> list[float]:
    return [sigmas[begin] - sigmas[end] for begin, end in itertools.pairwise((*full, len(sigmas) - 1))]


@pytest.mark.parametrize("num_full", [6, 8, 10])
@pytest.mark.parametrize("shift", [1, 2, 3, 5, 8])
def test_uniform_in_sigma_wastes_no_call_on_a_short_last_step(shift: float, num_full: int) -> None:
    sigmas = [shift * time / (1 + (shift - 1) * time) for time in np.linspace(1.0, 0.001, 50).tolist()] + [0.0]
    spans = _spans(sigmas, Schedule.uniform_in_sigma(sigmas, num_full).full_steps)
    assert 0.5 / num_full < min(spans) <= max(spans) < 1.6 / num_full


@given(st.integers(1, 40), st.data())
def test_uniform_in_sigma_keeps_its_counts(num_steps: int, data: st.DataObject) -> None:
    drops = data.draw(st.lists(st.floats(1e-3, 1.0), min_size=num_steps + 1, max_size=num_steps + 1))
    sigmas = [sum(drops[step:]) for step in range(num_steps + 1)]
    warmup = data.draw(st.integers(1, num_steps))
    count = data.draw(st.integers(warmup, num_steps))
    full = Schedule.uniform_in_sigma(sigmas, count, warmup).full_steps
    assert len(full) == count and full[:warmup] == tuple(range(warmup))
    spans = _spans(sigmas, full)[warmup - 1 :]
    assert min(spans) > 0 and sum(spans) == pytest.approx(sigmas[warmup - 1] - sigmas[-1])


@given(st.integers(1, 9), st.data())
def test_uniform_in_sigma_is_the_evenest(num_steps: int, data: st.DataObject) -> None:
    drops = data.draw(st.lists(st.floats(1e-3, 1.0), min_size=num_steps, max_size=num_steps))
    sigmas = [sum(drops[step:]) for step in range(num_steps + 1)]
    warmup = data.draw(st.integers(1, num_steps))
    count = data.draw(st.integers(warmup, num_steps))

    def unevenness(full: tuple[int, ...]) -> float:
        *spans, last = _spans(sigmas, full)[warmup - 1 :]
        return sum(span**2 for span in spans) + 1.5 * last**2

    others = [(*range(warmup), *each) for each in itertools.combinations(range(warmup, num_steps), count - warmup)]
    least = (sigmas[warmup - 1] - sigmas[-1]) / (2 * (count - warmup + 1))
    wide = [each for each in others if _spans(sigmas, each)[-1] >= least]
    best = min(map(unevenness, wide or others))
    assert unevenness(Schedule.uniform_in_sigma(sigmas, count, warmup).full_steps) == pytest.approx(best)


def test_explicit_sorts_and_drops_repeats() -> None:
    assert Schedule.explicit(10, [7, 0, 3, 7]).full_steps == (0, 3, 7)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Schedule(0, (0,)), ValueError, "num_steps must be at least 1, got 0"),
        (lambda: Schedule(5, (1, 2)), ValueError, "must start with step 0"),
        (lambda: Schedule(5, (0, 5)), ValueError, r"full_steps\[1\] must be below num_steps = 5, got 5"),
        (lambda: Schedule(5, (0, 3, 2)), ValueError, "ascending, got 3 before 2"),
        (lambda: Schedule(5, (0, 1.5)), TypeError, r"full_steps\[1\] must be an integer, got 1.5"),  # type: ignore[arg-type]
        (lambda: Schedule.interval(50, 0), ValueError, "interval must be at least 1, got 0"),
        (lambda: Schedule.interval(50, 7, 0), ValueError, "warmup must be at least 1, got 0"),
        (lambda: Schedule.uniform_in_sigma([1.0, 0.5, 0.0], 3), ValueError, "num_full must be at most 2"),
        (lambda: Schedule.uniform_in_sigma([1.0, 1.0, 0.0], 1), ValueError, "falling"),
    ],
)
def test_errors(make: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()  # type: ignore[operator]


def test_even_segments_do_not_depend_on_the_scale_of_the_levels() -> None:
    levels = [1 - (step / 20) ** 1.3 for step in range(20)] + [0.0]
    plain = Schedule.uniform_in_sigma(levels, 6)
    for scale in (1e300, 1e-300, 80.0):
        assert Schedule.uniform_in_sigma([scale * level for level in levels], 6) == plain

"""Chooses the full steps of a sampling run: pure integers, no torch. Steps are 0 .. S-1, sigmas t_0 > ... > t_S."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lesa_kernels.checks import check_decreasing, check_float, check_int, check_list

# More than any sampler takes; a number beyond it is a mistake, which would cost gigabytes.
MAX_STEPS = 10_000
# The published rule runs this step full whatever its counter says.
_ALWAYS_FULL = 3
# Of 1, 1.5, 2 and 3 the best mean on digits and MNIST, at 10, 8 and 6 calls under FLUX's, Qwen's and Wan's sigmas.
_LAST_SEGMENT_WEIGHT = 1.5


@dataclass(frozen=True)
class Schedule:
    """The full steps of a run of S steps; the model's blocks run on these alone.

    Args:
        num_steps: S, the number of sampling steps, at least 1.
        full_steps: which of them are full, ascending; step 0 must be one of them.

    Raises:
        ValueError: when a number is out of range, or the steps are not ascending, or step 0 is missing.
        TypeError: when a step is not an integer.
    """

    num_steps: int
    full_steps: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", check_int("num_steps", self.num_steps, 1, MAX_STEPS))
        object.__setattr__(self, "full_steps", _steps(self.full_steps))
        for position, step in enumerate(self.full_steps):
            if step >= self.num_steps:
                raise ValueError(f"full_steps[{position}] must be below num_steps = {self.num_steps}, got {step}")
            if position and step <= self.full_steps[position - 1]:
                raise ValueError(f"full_steps must be ascending, got {self.full_steps[position - 1]} before {step}")
        if not self.full_steps or self.full_steps[0] != 0:
            raise ValueError(
                f"full_steps must start with step 0 (there is nothing to forecast from), got {self.full_steps}"
            )

    @classmethod
    def interval(cls, num_steps: int, interval: int, warmup: int = 3) -> Schedule:
        """The published rule: full while warming up, then every `interval` steps; step 3 is always full.

        A counter starts at 0. A step is full if it is below `warmup` or the counter is `interval - 1`, which resets the
        counter; otherwise it is a forecast and adds one. Step 3 adds one where it would be a forecast, and runs full.

        Args:
            num_steps: S.
            interval: N, at least 1 (1: every step is full).
            warmup: E, at least 1.

        Returns:
            The schedule: 50 steps with interval 7 have full steps 0 1 2 3 9 16 23 30 37 44.

        Raises:
            ValueError: when a number is out of range.
        """
        num_steps = check_int("num_steps", num_steps, 1, MAX_STEPS)
        interval, warmup = check_int("interval", interval, 1), check_int("warmup", warmup, 1)
        full, counter = [], 0
        for step in range(num_steps):
            due = step < warmup or counter == interval - 1
            counter = 0 if due else counter + 1
            if due or step == _ALWAYS_FULL:
                full.append(step)
        return cls(num_steps, tuple(full))

    @classmethod
    def growing(cls, num_steps: int, interval: float = 2.0, growth: float = 0.75, warmup: int = 5) -> Schedule:
        """Spectrum's rule (arXiv 2603.01623): full while warming up, then at intervals that grow by a constant.

        Between the k-th and the (k+1)-th full step after the warm-up lie floor(interval + k * growth) steps; the first
        comes floor(interval) steps after the last one of the warm-up.

        Args:
            num_steps: S.
            interval: N of the paper, at least 1.
            growth: alpha of the paper, at least 0: how much longer each interval is than the one before.
            warmup: at least 1.

        Returns:
            The schedule: 50 steps have 14 full ones with the defaults, the paper's setting for 3.5 times fewer, and
            with growth=3.0, its setting for 5 times fewer, 0 1 2 3 4 6 11 19 30 44.

        Raises:
            ValueError: when a number is out of range.
            TypeError: when it is no number.
        """
        num_steps = check_int("num_steps", num_steps, 1, MAX_STEPS)
        interval, growth = check_float("interval", interval, least=1), check_float("growth", growth, least=0)
        full = list(range(min(check_int("warmup", warmup, 1), num_steps)))
        for count in range(num_steps):
            # Sums of decimal fractions may fall short of a whole number.
            distance = round(interval + count * growth, 3)
            if distance >= num_steps - full[-1]:
                break
            full.append(full[-1] + math.floor(distance))
        return cls(num_steps, tuple(full))

    @classmethod
    def explicit(cls, num_steps: int, full_steps: Iterable[int]) -> Schedule:
        """Return a schedule of any set of full steps.

        Args:
            num_steps: S.
            full_steps: in any order, repeats ignored; step 0 must be among them.
        """
        return cls(num_steps, tuple(sorted(set(_steps(full_steps)))))

    @classmethod
    def uniform_in_sigma(cls, sigmas: Sequence[float], num_full: int, warmup: int = 1) -> Schedule:
        """Full steps 0 .. warmup-1, the others so that their segments are as even in sigma as the steps allow.

        A segment goes from a full step to the next, the last one to sigma_S. The sum of their squared spans from the
        last warm-up step on is the smallest that there is, the last one's times 1.5: no full step mends what forecasts
        miss there, so it is two thirds as wide as the others. It is no narrower than half the mean, if steps remain to
        choose from: with diffusers' default sigmas the last step spans 0.004, which would waste a call.

        Args:
            sigmas: S+1 falling noise levels, the last one (after the last step) included.
            num_full: how many full steps, `warmup` to S.
            warmup: how many steps at the start are full, at least 1.

        Returns:
            The schedule.

        Raises:
            ValueError: when a count is out of range or the sigmas do not fall.
        """
        levels = check_decreasing(sigmas)
        num_steps = len(levels) - 1
        warmup = check_int("warmup", warmup, 1, num_steps)
        num_full = check_int("num_full", num_full, warmup)
        if num_full > num_steps:
            raise ValueError(
                f"num_full must be at most {num_steps} (the steps of {num_steps + 1} sigmas), got {num_full}"
            )
        begins = _even_segments(levels[warmup - 1 :], num_full - warmup + 1)
        return cls(num_steps, (*range(warmup - 1), *(warmup - 1 + begin for begin in begins)))

    @property
    def speedup(self) -> float:
        """Steps divided by full steps: how many times fewer calls of the blocks."""
        return self.num_steps / len(self.full_steps)


ScheduleRule: TypeAlias = Callable[[Sequence[float]], Schedule]
"""Makes a schedule once the S+1 sigmas are known, e.g. `functools.partial(Schedule.uniform_in_sigma, num_full=10)`."""


def _even_segments(levels: Sequence[float], count: int) -> list[int]:
    """Return where so many segments begin that reach from the first level to the last; see `uniform_in_sigma`."""
    size = len(levels)
    if count == 1:
        return [0]
    # Squares of levels on another scale could be beyond all numbers.
    levels = [(level - levels[-1]) / (levels[0] - levels[-1]) for level in levels]
    # Of segments that reach an end: the smallest sum of squared spans, and where the last of them begins.
    sums = [(levels[0] - level) ** 2 for level in levels]
    lasts = [[0] * size]
    for number in range(1, count - 1):
        found, last = [math.inf] * size, [0] * size
        for end in range(size - 1, number, -1):
            # The best begin moves on with the end and with the number of segments (Knuth 1971, Yao 1980).
            most = last[end + 1] if end + 1 < size else end - 1
            begins = range(max(lasts[-1][end], number), min(most, end - 1) + 1)
            found[end], last[end] = min((sums[begin] + (levels[begin] - levels[end]) ** 2, begin) for begin in begins)
        sums = found
        lasts.append(last)
    begins = range(count - 1, size - 1)
    least = (levels[0] - levels[-1]) / (2 * count)
    wide = [begin for begin in begins if levels[begin] - levels[-1] >= least] or begins
    weighted = [(sums[begin] + _LAST_SEGMENT_WEIGHT * (levels[begin] - levels[-1]) ** 2, begin) for begin in wide]
    path = [min(weighted)[1]]
    for last in reversed(lasts):
        path.append(last[path[-1]])
    return path[::-1]


def _steps(full_steps: object) -> tuple[int, ...]:
    steps = enumerate(check_list("full_steps", full_steps, "steps"))
    return tuple(check_int(f"full_steps[{position}]", step, 0) for position, step in steps)

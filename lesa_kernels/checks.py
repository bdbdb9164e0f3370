"""Checks arguments; each refusal names the argument, what is required and what came."""

from __future__ import annotations

import itertools
import math
import operator
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, SupportsFloat


def check_type(name: str, value: object, kinds: type | tuple[type, ...], what: str) -> None:
    """Check that an argument is of a type.

    Args:
        name: of the argument.
        value: what came.
        kinds: what it may be an instance of.
        what: the requirement in words, with its article.

    Raises:
        TypeError: when it is something else.
    """
    if not isinstance(value, kinds):
        raise TypeError(f"{name} must be {what}, got {reprlib.repr(value)}")


def check_int(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return an integer argument, Python's or NumPy's.

    Args:
        name: of the argument.
        value: what came.
        least: the smallest that is allowed.
        most: the largest that is allowed, None for any.

    Raises:
        TypeError: when it is no integer.
        ValueError: when it is out of range.
    """
    try:
        # A tensor has an index too, and a device that would have to be waited for.
        number = None if isinstance(value, bool) or hasattr(value, "device") else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name} must be an integer, got {reprlib.repr(value)}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {reprlib.repr(number)}")
    return number


def check_float(
    name: str, value: object, *, least: float | None = None, above: float | None = None, finite: bool = True
) -> float:
    """Return a number argument.

    Args:
        name: of the argument.
        value: what came.
        least: the smallest that is allowed, None for any.
        above: what it must be greater than, None for anything.
        finite: whether it must be finite.

    Raises:
        TypeError: when it is no number.
        ValueError: when it is out of range.
    """
    if isinstance(value, bool | type) or not isinstance(value, SupportsFloat) or hasattr(value, "device"):
        raise TypeError(f"{name} must be a number, got {reprlib.repr(value)}")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if finite and not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {reprlib.repr(value)}")
    if least is not None and not found >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if above is not None and not found > above:
        raise ValueError(f"{name} must be greater than {above}, got {value}")
    return found


def check_list(name: str, value: object, what: str) -> list[Any]:
    """Return what a sequence argument holds.

    Args:
        name: of the argument.
        value: what came; any iterable but texts and mappings.
        what: the requirement in words.

    Raises:
        TypeError: when it holds nothing.
    """
    try:
        if not isinstance(value, str | bytes | Mapping) and isinstance(value, Iterable):
            return list(value)
    # Some types are iterable, and some of their values are not.
    except TypeError:
        pass
    raise TypeError(f"{name} must be {what}, got {reprlib.repr(value)}")


def check_decreasing(sigmas: object, name: str = "sigmas") -> tuple[float, ...]:
    """Return noise levels as floats.

    Args:
        sigmas: a sequence or a 1-d tensor; of one on a GPU this is a wait.
        name: of the argument.

    Raises:
        TypeError: when they are no numbers.
        ValueError: when they are not at least two finite, falling numbers.
    """
    values = check_list(name, sigmas.tolist() if hasattr(sigmas, "tolist") else sigmas, "S+1 >= 2 falling numbers")
    levels = tuple(check_float(f"{name}[{index}]", value) for index, value in enumerate(values))
    if len(levels) < 2 or not all(later < earlier for earlier, later in itertools.pairwise(levels)):
        raise ValueError(f"{name} must hold S+1 >= 2 falling numbers, got {levels}")
    return levels

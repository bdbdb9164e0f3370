"""Conversions between types."""

from __future__ import annotations

import numpy as np

from ptxsim.parser import Instruction
from ptxsim.threads import Threads
from ptxsim.values import FLOATS, NUMPY, PAIRS, Mask, Values

# How a float becomes an integer: to the nearest, to zero, down, up.
_INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(threads: Threads, i: Instruction, mask: Mask) -> None:
    to, of = i.types[:2]
    if to in PAIRS:
        return _convert_pair(threads, i, mask)
    if to not in NUMPY or of not in NUMPY or {"rz", "rm", "rp"}.intersection(i.modifiers):
        raise i.unknown()
    x = threads.get(i.arguments[1], of)
    if of in FLOATS:
        value = _of_float(i, x, to)
    elif "sat" in i.modifiers:
        value = _saturated(x, to)
    else:
        value = x.astype(np.float32 if to == "bf16" else NUMPY[to])
    if to in ("u8", "s8"):  # a register has 16 bits at least
        to = f"{to[0]}16"
    threads.put(i.arguments[0], value, to, mask)
    return None


def _of_float(i: Instruction, x: Values, to: str) -> Values:
    rounding = next((_INTEGRAL[modifier] for modifier in i.modifiers if modifier in _INTEGRAL), None)
    if to in FLOATS:
        if to == "bf16" and x.dtype == np.float64:
            raise i.unknown()  # would be rounded twice
        value = x if rounding is None else rounding(x)
        return np.clip(np.nan_to_num(value), 0, 1) if "sat" in i.modifiers else value
    if rounding is None:
        raise i.unknown()
    whole = np.nan_to_num(rounding(x.astype(np.float64)), nan=0, posinf=np.inf, neginf=-np.inf)
    limits = np.iinfo(NUMPY[to])
    over, under = whole >= float(limits.max), whole <= float(limits.min)
    inside = np.where(over | under, 0, whole).astype(NUMPY[to])
    return np.where(over, limits.max, np.where(under, limits.min, inside)).astype(NUMPY[to])


def _saturated(x: Values, to: str) -> Values:
    limits = np.iinfo(NUMPY[to])
    return np.array([min(max(int(value), int(limits.min)), int(limits.max)) for value in x], NUMPY[to])


def _convert_pair(threads: Threads, i: Instruction, mask: Mask) -> None:
    """Round two floats: the first operand becomes the upper half."""
    to, of = i.types[:2]
    if of != "f32" or "rn" not in i.modifiers:
        raise i.unknown()
    value = np.stack([threads.get(argument, of) for argument in i.arguments[2:0:-1]], axis=1)
    threads.put(i.arguments[0], np.maximum(value, 0) if "relu" in i.modifiers else value, to, mask)


INSTRUCTIONS = {"cvt": _convert}

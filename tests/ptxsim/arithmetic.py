"""Arithmetic, comparisons and selections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim.parser import Instruction
from ptxsim.threads import Threads
from ptxsim.values import FLOATS, NUMPY, PAIRS, Mask, Values, size_of

# Modifiers that change a result and are not simulated.
_UNKNOWN = {"sat", "cc", "rz", "rm", "rp", "xorsign"}
_WIDER = {"16": "32", "32": "64"}


def _is_float(type_: str) -> bool:
    return type_ in FLOATS or type_ in PAIRS


def _elementwise(function: Callable[..., Values]) -> Callable[[Threads, Instruction, Mask], None]:
    """Make an instruction of a function of all its sources, in its only type."""

    def execute(threads: Threads, i: Instruction, mask: Mask) -> None:
        if _UNKNOWN.intersection(i.modifiers):
            raise i.unknown()
        sources = [threads.get(argument, i.type) for argument in i.arguments[1:]]
        threads.put(i.arguments[0], function(*sources), i.type, mask)

    return execute


def _product(i: Instruction, x: Values, y: Values) -> tuple[Values, str]:
    """Return the product that a modifier asks for, and its type."""
    kind, bits = i.type[0], i.type[1:]
    if "wide" in i.modifiers:
        wide = kind + _WIDER[bits]
        return x.astype(NUMPY[wide]) * y.astype(NUMPY[wide]), wide
    if i.one_of("lo", "hi") == "lo":
        return x * y, i.type
    if bits == "64":
        high = [int(a) * int(b) >> 64 & 0xFFFF_FFFF_FFFF_FFFF for a, b in zip(x, y, strict=True)]
        return np.array(high, np.uint64).view(x.dtype), i.type
    wide = kind + _WIDER[bits]
    return (x.astype(NUMPY[wide]) * y.astype(NUMPY[wide]) >> int(bits)).astype(x.dtype), i.type


_times = _elementwise(lambda x, y: x * y)


def _multiply(threads: Threads, i: Instruction, mask: Mask) -> None:
    if _is_float(i.type):
        return _times(threads, i, mask)
    product, type_ = _product(i, *(threads.get(argument, i.type) for argument in i.arguments[1:3]))
    threads.put(i.arguments[0], product, type_, mask)
    return None


def _multiply_add(threads: Threads, i: Instruction, mask: Mask) -> None:
    if _is_float(i.type):
        return _fused(threads, i, mask)
    if _UNKNOWN.intersection(i.modifiers):
        raise i.unknown()
    product, type_ = _product(i, *(threads.get(argument, i.type) for argument in i.arguments[1:3]))
    threads.put(i.arguments[0], product + threads.get(i.arguments[3], type_), type_, mask)
    return None


def _directed(value: Values, direction: float) -> Values:
    """Round doubles to float32, down or up."""
    nearest: Values = value.astype(np.float32)
    beyond = nearest > value if direction < 0 else nearest < value
    return np.where(beyond, np.nextafter(nearest, np.float32(direction)), nearest)


def _fused(threads: Threads, i: Instruction, mask: Mask) -> None:
    """A product and a sum, rounded to double and then to the type."""
    direction = {"rm": -np.inf, "rp": np.inf}.get(i.modifiers[0]) if i.type == "f32" else None
    if direction is None and _UNKNOWN.intersection(i.modifiers):
        raise i.unknown()
    x, y, z = (threads.get(argument, i.type).astype(np.float64) for argument in i.arguments[1:4])
    value = x * y + z
    if "relu" in i.modifiers:
        value = np.maximum(value, 0)
    if direction is not None:
        value = _directed(value, direction)
    threads.put(i.arguments[0], value if i.type == "f64" else value.astype(np.float32), i.type, mask)


def _quotient(x: Values, y: Values) -> Values:
    if x.dtype.kind == "f":
        return x / y
    return np.where(y == 0, 0, (x - np.fmod(x, y)) // np.where(y == 0, 1, y)).astype(x.dtype)


def _extreme(integers: Any, floats: Any) -> Callable[[Threads, Instruction, Mask], None]:
    """The smallest or largest: a NaN is passed over, or wins."""
    quiet, loud = _elementwise(floats), _elementwise(integers)

    def execute(threads: Threads, i: Instruction, mask: Mask) -> None:
        if len(i.arguments) != 3:
            raise i.unknown()
        (loud if "NaN" in i.modifiers or not _is_float(i.type) else quiet)(threads, i, mask)

    return execute


_CLASSES: dict[str, Callable[[Values], Values]] = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "notanumber": np.isnan,
    "number": lambda x: ~np.isnan(x),
}


def _test_property(threads: Threads, i: Instruction, mask: Mask) -> None:
    value = _CLASSES[i.one_of(*_CLASSES)](threads.get(i.arguments[1], i.type))
    threads.put_bits(i.arguments[0], value, mask)


_COMPARISONS: dict[str, Callable[[Values, Values], Values]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_LOGIC: dict[str, Callable[[Values, Values], Values]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def _compare(i: Instruction, x: Values, y: Values) -> Values:
    name = i.modifiers[0]
    nan = np.isnan(x) | np.isnan(y) if x.dtype.kind == "f" else np.zeros(x.shape, bool)
    if name in ("num", "nan"):
        return nan if name == "nan" else ~nan
    if name in _COMPARISONS:
        return _COMPARISONS[name](x, y) & ~nan
    if name.removesuffix("u") in _COMPARISONS:
        return _COMPARISONS[name.removesuffix("u")](x, y) | nan
    raise i.unknown()


def _set_predicate(threads: Threads, i: Instruction, mask: Mask) -> None:
    """Write the comparison to p and its opposite to q where p|q is given; both combined with a third operand."""
    holds = _compare(i, *(threads.get(argument, i.type) for argument in i.arguments[1:3]))
    registers = i.arguments[0].split("|")
    results = [*holds.T] if i.type in PAIRS else [holds, ~holds]
    logic = _LOGIC.get(i.modifiers[1])
    if logic is not None:
        other = threads.get(i.arguments[3], "pred")
        results = [logic(result, other) for result in results]
    for register, result in zip(registers, results, strict=False):
        threads.put_bits(register, np.ascontiguousarray(result), mask)


def _select(threads: Threads, i: Instruction, mask: Mask) -> None:
    x, y = (threads.bits(argument, size_of(i.type)) for argument in i.arguments[1:3])
    threads.put_bits(i.arguments[0], np.where(threads.get(i.arguments[3], "pred"), x, y), mask)


def _select_by_sign(threads: Threads, i: Instruction, mask: Mask) -> None:
    x, y = (threads.bits(argument, size_of(i.types[0])) for argument in i.arguments[1:3])
    threads.put_bits(i.arguments[0], np.where(threads.get(i.arguments[3], i.types[1]) >= 0, x, y), mask)


INSTRUCTIONS = {
    "add": _elementwise(lambda x, y: x + y),
    "sub": _elementwise(lambda x, y: x - y),
    "mul": _multiply,
    "mad": _multiply_add,
    "fma": _fused,
    "div": _elementwise(_quotient),
    "rem": _elementwise(lambda x, y: np.where(y == 0, 0, np.fmod(x, np.where(y == 0, 1, y)))),
    "neg": _elementwise(lambda x: -x if x.dtype.kind == "f" else 0 - x),
    "abs": _elementwise(np.abs),
    "min": _extreme(np.minimum, np.fmin),
    "max": _extreme(np.maximum, np.fmax),
    "rcp": _elementwise(lambda x: x.dtype.type(1) / x),
    "sqrt": _elementwise(np.sqrt),
    "rsqrt": _elementwise(lambda x: x.dtype.type(1) / np.sqrt(x)),
    "ex2": _elementwise(np.exp2),
    "lg2": _elementwise(np.log2),
    "tanh": _elementwise(np.tanh),
    "sin": _elementwise(np.sin),
    "cos": _elementwise(np.cos),
    "copysign": _elementwise(lambda sign, x: np.copysign(x, sign)),
    "testp": _test_property,
    "setp": _set_predicate,
    "selp": _select,
    "slct": _select_by_sign,
}

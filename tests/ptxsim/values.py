"""The numbers of PTX: its types, its literals, and the formats that NumPy lacks."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[Any]  # the first dimension: threads
Mask = NDArray[np.bool_]


class PtxError(RuntimeError):
    """The kernel did what a correct kernel never does, or used an instruction that is not simulated."""


# What holds a type; of bfloat16 the bits.
NUMPY: dict[str, Any] = {
    **{f"u{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"b{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    **{f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    "bf16": np.dtype(np.uint16),
}
UNSIGNED: dict[int, Any] = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
FLOATS = {"f16", "bf16", "f32", "f64"}
PAIRS = {"f16x2", "bf16x2"}
TYPES = {*NUMPY, *PAIRS, "pred", "tf32"}

_FLOAT = re.compile(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")
_INTEGER = re.compile(r"(-?(?:0[xX][0-9a-fA-F]+|\d+))U?")


@functools.cache
def size_of(type_: str) -> int:
    """Return how many bytes a type takes; a predicate takes one here."""
    if type_ == "pred":
        return 1
    bits = re.search(r"(\d+)(x2)?$", type_)
    if bits is None:
        raise PtxError(f"unknown type: {type_}")
    return int(bits[1]) // 8 * (2 if bits[2] else 1)


@functools.cache
def literal(text: str) -> int | None:
    """Return the bits of a number in a program, None where the text is no number."""
    if _FLOAT.fullmatch(text):
        return int(text[2:], 16)
    found = _INTEGER.fullmatch(text)
    return int(found[1], 0 if "x" in text.lower() else 10) if found else None


def integer(text: str) -> int:
    """Return the integer that an instruction needs."""
    value = literal(text)
    if value is None:
        raise PtxError(f"a number should stand for {text!r}")
    return value


def bf16_to_f32(bits: Values) -> Values:
    """Widen bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: Values) -> Values:
    """Round to the nearest bfloat16, ties to even; every NaN becomes 0x7FFF."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)

"""Instructions on bits, whatever they stand for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptxsim.parser import Instruction
from ptxsim.threads import Threads
from ptxsim.values import UNSIGNED, Mask, Values, integer, size_of

_ONE = np.uint64(1)


def _logic(function: Callable[..., Values]) -> Callable[[Threads, Instruction, Mask], None]:
    def execute(threads: Threads, i: Instruction, mask: Mask) -> None:
        size = size_of(i.type)
        read = (lambda a: threads.get(a, "pred")) if i.type == "pred" else (lambda a: threads.bits(a, size))
        threads.put_bits(i.arguments[0], function(*map(read, i.arguments[1:])), mask)

    return execute


def _shift_left(threads: Threads, i: Instruction, mask: Mask) -> None:
    size = size_of(i.type)
    x, count = threads.bits(i.arguments[1], size), threads.bits(i.arguments[2], 4)
    shifted = x << np.minimum(count, 8 * size - 1).astype(x.dtype)
    threads.put_bits(i.arguments[0], np.where(count < 8 * size, shifted, x.dtype.type(0)), mask)


def _shift_right(threads: Threads, i: Instruction, mask: Mask) -> None:
    size = size_of(i.type)
    x, count = threads.get(i.arguments[1], i.type), threads.bits(i.arguments[2], 4)
    shifted = x >> np.minimum(count, 8 * size - 1).astype(x.dtype)
    if i.type[0] != "s":
        shifted = np.where(count < 8 * size, shifted, x.dtype.type(0))
    threads.put_bits(i.arguments[0], shifted, mask)


def _funnel_shift(threads: Threads, i: Instruction, mask: Mask) -> None:
    low, high, count = (threads.bits(argument, 4).astype(np.uint64) for argument in i.arguments[1:4])
    count = np.minimum(count, 32) if i.one_of("clamp", "wrap") == "clamp" else count & np.uint64(31)
    both = low | high << np.uint64(32)
    shifted = both << count >> np.uint64(32) if i.one_of("l", "r") == "l" else both >> count
    threads.put_bits(i.arguments[0], shifted.astype(np.uint32), mask)


def _lowest(count: Values) -> Values:
    """Return so many ones."""
    count = np.minimum(count.astype(np.uint64), np.uint64(64))
    return np.where(count == 64, ~np.uint64(0), (_ONE << np.minimum(count, np.uint64(63))) - _ONE)


def _extract_field(threads: Threads, i: Instruction, mask: Mask) -> None:
    x = threads.get(i.arguments[1], i.type)
    place, length = (threads.bits(argument, 4) & 0xFF for argument in i.arguments[2:4])
    wide = x.astype(np.int64 if x.dtype.kind == "i" else np.uint64)
    shifted = (wide >> np.minimum(place, 63).astype(wide.dtype)).view(np.uint64)
    if i.type[0] == "s":  # the sign is the field's last bit
        last = np.clip(length.astype(np.int64) - 1, 0, 63).astype(np.uint64)
        negative = (length > 0) & (shifted >> last & _ONE == 1)
        field = np.where(negative, shifted | ~_lowest(length), shifted & _lowest(length))
    else:
        field = np.where(place < 64, shifted & _lowest(length), np.uint64(0))
    threads.put_bits(i.arguments[0], field.astype(UNSIGNED[size_of(i.type)]), mask)


def _insert_field(threads: Threads, i: Instruction, mask: Mask) -> None:
    size = size_of(i.type)
    field, x = (threads.bits(argument, size).astype(np.uint64) for argument in i.arguments[1:3])
    place, length = (threads.bits(argument, 4) & 0xFF for argument in i.arguments[3:5])
    shift = np.minimum(place, 63).astype(np.uint64)
    ones = np.where(place < 64, _lowest(length) << shift, np.uint64(0))
    threads.put_bits(i.arguments[0], (x & ~ones | field << shift & ones).astype(UNSIGNED[size]), mask)


def _count_ones(threads: Threads, i: Instruction, mask: Mask) -> None:
    x = threads.bits(i.arguments[1], size_of(i.type))
    threads.put_bits(i.arguments[0], np.array([int(value).bit_count() for value in x], np.uint32), mask)


def _count_leading_zeros(threads: Threads, i: Instruction, mask: Mask) -> None:
    x = threads.bits(i.arguments[1], size_of(i.type))
    width = 8 * size_of(i.type)
    threads.put_bits(i.arguments[0], np.array([width - int(value).bit_length() for value in x], np.uint32), mask)


def _permute(threads: Threads, i: Instruction, mask: Mask) -> None:
    """Each four bits of the selector choose a byte of two words, or copies of its sign."""
    if i.modifiers != ("b32",):
        raise i.unknown()
    low, high, selector = (np.ascontiguousarray(threads.bits(argument, 4)) for argument in i.arguments[1:4])
    source = np.concatenate([word.view(np.uint8).reshape(-1, 4) for word in (low, high)], axis=1)
    result = np.zeros((threads.count, 4), np.uint8)
    for place in range(4):
        choice = selector >> 4 * place & 0xF
        byte = source[np.arange(threads.count), (choice & 7).astype(np.int64)]
        result[:, place] = np.where(choice & 8, np.where(byte & 0x80, 0xFF, 0), byte)
    threads.put_bits(i.arguments[0], result.view(np.uint32).reshape(-1), mask)


def _any_logic(threads: Threads, i: Instruction, mask: Mask) -> None:
    """A truth table of three operands."""
    if i.modifiers != ("b32",):
        raise i.unknown()
    a, b, c = (threads.bits(argument, 4) for argument in i.arguments[1:4])
    table = integer(i.arguments[4])
    result = np.zeros(threads.count, np.uint32)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    threads.put_bits(i.arguments[0], result, mask)


INSTRUCTIONS = {
    "and": _logic(lambda x, y: x & y),
    "or": _logic(lambda x, y: x | y),
    "xor": _logic(lambda x, y: x ^ y),
    "not": _logic(lambda x: ~x),
    "shl": _shift_left,
    "shr": _shift_right,
    "shf": _funnel_shift,
    "bfe": _extract_field,
    "bfi": _insert_field,
    "popc": _count_ones,
    "clz": _count_leading_zeros,
    "prmt": _permute,
    "lop3": _any_logic,
}

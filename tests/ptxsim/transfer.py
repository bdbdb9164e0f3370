"""Moves between registers and to and from memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptxsim.memory import WINDOWS
from ptxsim.parser import Instruction, registers_of
from ptxsim.threads import Threads
from ptxsim.values import NUMPY, PAIRS, UNSIGNED, Mask, PtxError, Values, integer, size_of


def _move(threads: Threads, i: Instruction, mask: Mask) -> None:
    to, of = i.arguments
    if to.startswith("{"):
        registers = registers_of(to)
        value = np.ascontiguousarray(threads.bits(of, size_of(i.type)))
        parts = value.view(UNSIGNED[value.dtype.itemsize // len(registers)]).reshape(-1, len(registers))
        for register, part in zip(registers, parts.T, strict=True):
            threads.put_bits(register, part, mask)
    elif of.startswith("{"):
        registers = registers_of(of)
        size = size_of(i.type)
        parts = np.stack([threads.bits(register, size // len(registers)) for register in registers], axis=1)
        threads.put_bits(to, np.ascontiguousarray(parts).view(UNSIGNED[size]).reshape(-1), mask)
    elif i.type == "pred":
        threads.put_bits(to, threads.get(of, "pred"), mask)
    else:
        threads.put_bits(to, threads.bits(of, size_of(i.type)), mask)


def _convert_address(threads: Threads, i: Instruction, mask: Mask) -> None:
    window = np.uint64(WINDOWS.get(i.space, 0))
    address = threads.bits(i.arguments[1], 8)
    threads.put_bits(i.arguments[0], address - window if "to" in i.modifiers else address + window, mask)


def _load(threads: Threads, i: Instruction, mask: Mask) -> None:
    size, registers = size_of(i.type), registers_of(i.arguments[0])
    data = threads.read(i.space, threads.addresses(i.arguments[1]), size * len(registers), mask)
    for number, register in enumerate(registers):
        value = np.ascontiguousarray(data[:, number * size : (number + 1) * size]).view(UNSIGNED[size]).reshape(-1)
        if i.type in ("s8", "s16"):  # a wider register holds it with its sign
            value = value.view(NUMPY[i.type]).astype(np.int32)
        threads.put_bits(register, value, mask)


def _bytes_of(threads: Threads, register: str, size: int) -> Values:
    value: Values = np.ascontiguousarray(threads.bits(register, size))
    return value.view(np.uint8).reshape(-1, size)


def _store(threads: Threads, i: Instruction, mask: Mask) -> None:
    data = [_bytes_of(threads, register, size_of(i.type)) for register in registers_of(i.arguments[1])]
    threads.write(i.space, threads.addresses(i.arguments[0]), np.concatenate(data, axis=1), mask)


# What an atomic operation makes of the value in memory and its operands.
_ATOMIC: dict[str, Callable[..., Any]] = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "exch": lambda old, x: x,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "cas": lambda old, expected, x: x if old == expected else old,
    "inc": lambda old, most: 0 if old >= most else old + 1,
}


def _change_memory(threads: Threads, i: Instruction, mask: Mask, operands: tuple[str, ...]) -> Values:
    """Do an atomic operation, one thread after the other, and return what memory held."""
    if i.type in {"bf16", *PAIRS}:
        raise i.unknown()
    function, (place, *sources) = _ATOMIC[i.one_of(*_ATOMIC)], operands
    address, values = threads.addresses(place), [threads.get(source, i.type) for source in sources]
    before = np.zeros(threads.count, NUMPY[i.type])
    checked, threads.shared.check_races = threads.shared.check_races, False  # atomics do not race with each other
    for thread in np.flatnonzero(mask):
        alone = np.zeros(threads.count, bool)
        alone[thread] = True
        data = threads.read(i.space, address, before.itemsize, alone)
        before[thread] = data[thread].view(NUMPY[i.type])[0]
        after = function(before[thread], *(value[thread] for value in values))
        data[thread] = np.asarray(after, NUMPY[i.type]).reshape(1).view(np.uint8)
        threads.write(i.space, address, data, alone)
    threads.shared.check_races = checked
    return before


def _atomic(threads: Threads, i: Instruction, mask: Mask) -> None:
    threads.put(i.arguments[0], _change_memory(threads, i, mask, i.arguments[1:]), i.type, mask)


def _reduce(threads: Threads, i: Instruction, mask: Mask) -> None:
    if "async" in i.modifiers:
        raise i.unknown()
    _change_memory(threads, i, mask, i.arguments)


def _copy_async(threads: Threads, i: Instruction, mask: Mask) -> None:
    """A copy from global to shared memory, which is done at once here."""
    if "async" not in i.modifiers or any(modifier.startswith("bulk") for modifier in i.modifiers):
        raise i.unknown()
    if {"commit_group", "wait_group", "wait_all"}.intersection(i.modifiers):
        return
    size, copied = integer(i.arguments[2]), mask
    if len(i.arguments) > 3:  # how much to copy; the rest becomes zero
        length = threads.bits(i.arguments[3], 4)
        if not np.isin(length[mask], (0, size)).all():
            raise PtxError("cp.async of a part is not simulated")
        copied = mask & (length == size)
    data = threads.read("global", threads.addresses(i.arguments[1]), size, copied)
    threads.write("shared", threads.addresses(i.arguments[0]), data, mask)


INSTRUCTIONS = {
    "mov": _move,
    "cvta": _convert_address,
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "atom": _atomic,
    "red": _reduce,
    "cp": _copy_async,
}

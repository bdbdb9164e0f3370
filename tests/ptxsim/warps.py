"""Instructions of whole warps: shuffles, votes, reductions, and 8x8 matrices of 16-bit elements."""

from __future__ import annotations

import numpy as np

from ptxsim.parser import Instruction, registers_of
from ptxsim.threads import Threads
from ptxsim.values import Mask, PtxError, Values


def _shuffle(threads: Threads, i: Instruction, mask: Mask) -> None:
    """Read a register of another lane, or one's own where there is none in the segment."""
    i.one_of("sync")
    value = threads.bits(i.arguments[1], 4)
    distance, limits = (threads.bits(argument, 4).astype(np.int64) for argument in i.arguments[2:4])
    threads.check_converged(threads.bits(i.arguments[4], 4), mask)
    clamp, segment = limits & 31, limits >> 8 & 31
    lane = threads.lane
    first, last = lane & segment, lane & segment | clamp & ~segment
    mode = i.one_of("up", "down", "bfly", "idx")
    other = {
        "up": lane - distance,
        "down": lane + distance,
        "bfly": lane ^ distance,
        "idx": first | distance & ~segment,
    }[mode]
    inside = other >= last if mode == "up" else other <= last
    source = np.arange(threads.count) + np.where(inside, other - lane, 0)
    source = np.clip(source, 0, threads.count - 1)
    takes_part = mask[source] & (threads.warp_of_launch[source] == threads.warp_of_launch)
    if (mask & inside & ~takes_part).any():
        raise PtxError("shuffle reads from a lane that is not taking part")
    register, *predicate = i.arguments[0].split("|")
    threads.put_bits(register, value[source], mask)
    if predicate:
        threads.put_bits(predicate[0], inside, mask)


def _vote(threads: Threads, i: Instruction, mask: Mask) -> None:
    i.one_of("sync")
    threads.check_converged(threads.bits(i.arguments[2], 4), mask)
    yes = threads.lanes(mask & threads.get(i.arguments[1], "pred"))
    mode = i.one_of("ballot", "any", "all")
    result = {"ballot": yes, "any": yes != 0, "all": yes == threads.lanes(mask)}[mode]
    threads.put_bits(i.arguments[0], result, mask)


def _active_mask(threads: Threads, i: Instruction, mask: Mask) -> None:
    threads.put_bits(i.arguments[0], threads.lanes(mask), mask)


_REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _reduce(threads: Threads, i: Instruction, mask: Mask) -> None:
    i.one_of("sync")
    threads.check_converged(threads.bits(i.arguments[2], 4), mask)
    value = threads.get(i.arguments[1], i.type)
    warp = threads.warp_of_launch[mask]
    first = np.flatnonzero(np.diff(warp, prepend=-1))
    reduced = _REDUCTIONS[i.one_of(*_REDUCTIONS)].reduceat(value[mask], first)
    result = np.zeros_like(value)
    result[mask] = np.repeat(reduced, np.diff(first, append=warp.size))
    threads.put(i.arguments[0], result, i.type, mask)


def _elect(threads: Threads, i: Instruction, mask: Mask) -> None:
    """Choose the first lane that takes part."""
    i.one_of("sync")
    threads.check_converged(threads.bits(i.arguments[1], 4), mask)
    lanes = threads.lanes(mask)
    register, predicate = i.arguments[0].split("|")
    first = np.array([(int(bits) & -int(bits)).bit_length() - 1 for bits in lanes])
    threads.put_bits(register, first.astype(np.uint32), mask)
    threads.put_bits(predicate, threads.lane == first, mask)


def _matrix_rows(threads: Threads, i: Instruction, mask: Mask, address: str) -> Values:
    """Return the addresses [threads, matrices, 8] of the rows, which each eight lanes of a warp hold for one matrix."""
    if "m8n8" not in i.modifiers or i.type != "b16":
        raise i.unknown()
    threads.check_converged(np.full(threads.count, 0xFFFF_FFFF, np.uint32), mask)
    if threads.in_block % 32:
        raise PtxError("matrices need whole warps")
    count = {"x1": 1, "x2": 2, "x4": 4}[i.one_of("x1", "x2", "x4")]
    of_warp = threads.addresses(address).reshape(-1, 32)[:, : 8 * count].reshape(-1, 1, count, 8)
    rows = np.broadcast_to(of_warp, (of_warp.shape[0], 32, count, 8)).reshape(-1, count, 8)
    if (rows[mask] % 16).any():
        raise PtxError("misaligned row of a matrix")
    return rows


def _parts(threads: Threads, i: Instruction, rows: Values) -> list[tuple[Values, int]]:
    """Return the places of a thread's two elements of one matrix, as addresses and their sizes in bytes."""
    thread, row, column = np.arange(threads.count), threads.lane // 4, threads.lane % 4 * 2
    if "trans" in i.modifiers:  # one below the other
        offset = (2 * row).astype(np.uint64)
        return [(rows[thread, column + below] + offset, 2) for below in (0, 1)]
    return [(rows[thread, row] + (2 * column).astype(np.uint64), 4)]


def _load_matrices(threads: Threads, i: Instruction, mask: Mask) -> None:
    rows = _matrix_rows(threads, i, mask, i.arguments[1])
    for number, register in enumerate(registers_of(i.arguments[0])):
        parts = [threads.read("shared", place, size, mask) for place, size in _parts(threads, i, rows[:, number])]
        data = np.ascontiguousarray(np.concatenate(parts, axis=1))
        threads.put_bits(register, data.view(np.uint32).reshape(-1), mask)


def _store_matrices(threads: Threads, i: Instruction, mask: Mask) -> None:
    rows = _matrix_rows(threads, i, mask, i.arguments[0])
    for number, register in enumerate(registers_of(i.arguments[1])):
        data = np.ascontiguousarray(threads.bits(register, 4)).view(np.uint8).reshape(-1, 4)
        for part, (place, size) in enumerate(_parts(threads, i, rows[:, number])):
            threads.write("shared", place, data[:, part * size : (part + 1) * size], mask)


INSTRUCTIONS = {
    "shfl": _shuffle,
    "vote": _vote,
    "activemask": _active_mask,
    "redux": _reduce,
    "elect": _elect,
    "ldmatrix": _load_matrices,
    "stmatrix": _store_matrices,
}

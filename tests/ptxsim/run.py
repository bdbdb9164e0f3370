"""The loop: of all threads that can go on, those that are furthest behind execute the next instruction."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptxsim import arithmetic, bits, convert, transfer, warps
from ptxsim.parser import Instruction
from ptxsim.threads import DONE, WAITS, Threads
from ptxsim.values import Mask, PtxError, integer, literal

Handler = Callable[[Threads, Instruction, Mask], None]


def run(threads: Threads, most_steps: int) -> int:
    """Run blocks to their end.

    Args:
        threads: of the blocks, at their first instruction.
        most_steps: after so many instructions a loop counts as endless.

    Returns:
        How many instructions some threads executed.

    Raises:
        PtxError: for a fault, with the instruction and the first of its threads.
    """
    code, steps = threads.kernel.code, 0
    with np.errstate(all="ignore"):
        while (place := int(threads.pc.min())) != DONE:
            if place == WAITS:
                _release(threads)
                continue
            here = threads.pc == place
            if place >= len(code):
                threads.pc[here] = DONE
                continue
            steps += 1
            threads.pc[here] = place + 1
            try:
                if steps > most_steps:
                    raise PtxError(f"more than {most_steps} steps: an endless loop?")
                _execute(threads, code[place], here)
            except PtxError as error:
                first = int(np.flatnonzero(here)[0])
                raise PtxError(
                    f"{error}\n  in {threads.kernel.name}\n  at: {code[place].text}\n  first thread: "
                    f"block {threads.block_of_grid[first]} thread {first % threads.in_block}"
                ) from None
    return steps


def _execute(threads: Threads, instruction: Instruction, here: Mask) -> None:
    handler = _INSTRUCTIONS.get(instruction.op)
    if handler is None:
        raise instruction.unknown()
    if instruction.guard:
        guard = threads.get(instruction.guard, "pred")
        here = here & (~guard if instruction.negated else guard)
        if not here.any():
            return
    handler(threads, instruction, here)


def _release(threads: Threads) -> None:
    """Let blocks go on all of whose threads wait at one barrier."""
    shape = threads.blocks, threads.in_block
    pc, barrier, resume = (array.reshape(shape) for array in (threads.pc, threads.barrier, threads.resume))
    waits, most = pc == WAITS, np.iinfo(np.int64).max
    barriers, places = (
        (np.where(waits, array, most).min(1), np.where(waits, array, -1).max(1)) for array in (barrier, resume)
    )
    complete = waits.any(1) & (barriers[0] == barriers[1])
    if not complete.any():
        raise PtxError(f"deadlock in {threads.kernel.name}: threads wait at barriers that others never reach")
    if (complete & (places[0] != places[1])).any():
        raise PtxError(f"threads of one block wait at different barriers in {threads.kernel.name}")
    threads.pc[:] = np.where(waits & complete[:, None], resume, pc).reshape(-1)
    threads.epoch[complete] += 1


def _branch(threads: Threads, i: Instruction, mask: Mask) -> None:
    threads.pc[mask] = threads.kernel.labels[i.arguments[0]]


def _branch_by_index(threads: Threads, i: Instruction, mask: Mask) -> None:
    targets = np.array([threads.kernel.labels[label] for label in threads.kernel.tables[i.arguments[1]]])
    threads.pc[mask] = targets[threads.bits(i.arguments[0], 4)[mask].astype(np.int64)]


def _return(threads: Threads, i: Instruction, mask: Mask) -> None:
    threads.pc[mask] = DONE


def _trap(threads: Threads, i: Instruction, mask: Mask) -> None:
    raise PtxError("the kernel trapped (a device-side assert or __trap)")


def _barrier(threads: Threads, i: Instruction, mask: Mask) -> None:
    if "warp" in i.modifiers:
        return threads.check_converged(threads.bits(i.arguments[0], 4), mask)
    i.one_of("sync")
    if len(i.arguments) > 1 and (threads.bits(i.arguments[1], 4)[mask] != threads.in_block).any():
        raise PtxError("barriers for a part of a block are not simulated")
    if literal(i.arguments[0]) is None:
        raise i.unknown()
    threads.barrier[mask], threads.resume[mask] = integer(i.arguments[0]), threads.pc[mask]
    threads.pc[mask] = WAITS
    return None


def _nothing(threads: Threads, i: Instruction, mask: Mask) -> None:
    """Fences and hints: every access here is done at once."""


_INSTRUCTIONS: dict[str, Handler] = {
    **arithmetic.INSTRUCTIONS,
    **bits.INSTRUCTIONS,
    **convert.INSTRUCTIONS,
    **transfer.INSTRUCTIONS,
    **warps.INSTRUCTIONS,
    "bra": _branch,
    "brx": _branch_by_index,
    "ret": _return,
    "exit": _return,
    "trap": _trap,
    "bar": _barrier,
    "barrier": _barrier,
    **dict.fromkeys(
        ("membar", "fence", "prefetch", "discard", "applypriority", "griddepcontrol", "nanosleep"), _nothing
    ),
}

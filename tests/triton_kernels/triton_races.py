"""Races in global memory, which the simulator does not look for: it runs the warps of a launch in step."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]


class Accesses:
    """What the threads of one launch read and wrote, byte by byte."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all accesses."""
        self._notes: list[tuple[Numbers, ...]] = []

    def add(self, address: Numbers, size: int, write: bool, block: Numbers, epoch: Numbers, warp: Numbers) -> None:
        """Note an access of some threads; an epoch is the time between two barriers of a block."""
        byte = (address[:, None] + np.arange(size, dtype=np.uint64)).reshape(-1)
        of_thread = [np.repeat(value, size) for value in (block, epoch, warp)]
        self._notes.append((byte, *of_thread, np.full(byte.size, write)))

    def check(self) -> None:
        """Check that who writes a byte is alone with it: a block for the launch, a warp from barrier to barrier.

        The next launch starts anew.

        Raises:
            AssertionError: for a race.
        """
        if self._notes:
            byte, block, epoch, warp, write = (np.concatenate(column) for column in zip(*self._notes, strict=True))
            self.clear()
            assert not _shared([byte], block, write), "a block writes what another one reads or writes"
            assert not _shared([byte, block, epoch], warp, write), "a warp writes what another one reads or writes"


def _shared(keys: list[Numbers], owner: Numbers, write: Numbers) -> bool:
    """Return whether some accesses of equal keys have more than one owner, and a write among them."""
    order = np.lexsort(keys)
    changes = np.zeros(order.size, bool)
    changes[0] = True
    for key in keys:
        changes[1:] |= key[order][1:] != key[order][:-1]
    first = np.flatnonzero(changes)
    lowest, highest = (extreme.reduceat(owner[order], first) for extreme in (np.minimum, np.maximum))
    return bool(np.any((lowest != highest) & np.logical_or.reduceat(write[order], first)))


def watch(ptxsim: ModuleType) -> Accesses:
    """Let the simulator note every access to global memory, and return where."""
    accesses = Accesses()

    class Watched(ptxsim._Run):  # type: ignore[misc, name-defined]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.ids = arguments[5]

        def _note(self, space: str, address: Numbers, size: int, threads: Numbers, write: bool) -> None:
            if space == "global":
                block, warp = self.blk[threads], self.warp[threads]
                accesses.add(address[threads], size, write, self.ids[block], self.epoch[block], warp)

        def _read(self, space: str, address: Numbers, size: int, threads: Numbers) -> Numbers:
            self._note(space, address, size, threads, False)
            return super()._read(space, address, size, threads)

        def _write(self, space: str, address: Numbers, data: Numbers, threads: Numbers) -> None:
            self._note(space, address, data.shape[1], threads, True)
            super()._write(space, address, data, threads)

    ptxsim._Run = Watched
    return accesses

"""Races in global memory, found after a launch: the simulator runs the warps in step, so that none shows by itself."""

from __future__ import annotations

import numpy as np

from ptxsim.values import Values


class GlobalAccesses:
    """What the threads of one launch read and wrote, byte by byte; `add` is an observer of the launch."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all accesses."""
        self._notes: list[tuple[Values, ...]] = []

    def add(self, address: Values, size: int, write: bool, block: Values, epoch: Values, warp: Values) -> None:
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


def _shared(keys: list[Values], owner: Values, write: Values) -> bool:
    """Return whether some accesses of equal keys have more than one owner, and a write among them."""
    order = np.lexsort(keys)
    changes = np.zeros(order.size, bool)
    changes[0] = True
    for key in keys:
        changes[1:] |= key[order][1:] != key[order][:-1]
    first = np.flatnonzero(changes)
    lowest, highest = (extreme.reduceat(owner[order], first) for extreme in (np.minimum, np.maximum))
    return bool(np.any((lowest != highest) & np.logical_or.reduceat(write[order], first)))

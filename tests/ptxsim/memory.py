"""Global memory and the shared memory of blocks, whose every access is checked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ptxsim.values import Mask, PtxError, Values

# Where the other spaces lie in generic addresses.
WINDOWS = {"param": 0x5000_0000_0000, "local": 0x6000_0000_0000, "shared": 0x7000_0000_0000}
_GLOBAL = 0x1000_0000_0000


class Memory:
    """Global memory: arrays with unmapped gaps between them."""

    def __init__(self) -> None:
        self._bases: list[int] = []
        self._arrays: list[Values] = []
        self._next = _GLOBAL

    def add(self, array: Values) -> int:
        """Map a contiguous array, which must outlive the kernels that use it, and return its address."""
        if not array.flags["C_CONTIGUOUS"]:
            raise ValueError("arrays given to the simulator must be C-contiguous")
        flat = array.reshape(-1).view(np.uint8)
        for base, known in zip(self._bases, self._arrays, strict=True):
            if known.size == flat.size and flat.size and known.ctypes.data == flat.ctypes.data:
                return base
        base = self._next
        self._bases.append(base)
        self._arrays.append(flat)
        self._next = base + ((flat.size + 0xFFFF) & ~0xFFFF) + 0x10000
        return base

    def read(self, address: Values, size: int) -> Values:
        """Return the bytes [threads, size] at addresses."""
        data = np.empty((address.size, size), np.uint8)
        for threads, array, offset in self._locate(address, size, "read"):
            data[threads] = array[offset[:, None] + np.arange(size)]
        return data

    def write(self, address: Values, data: Values) -> None:
        """Write bytes [threads, size] to addresses."""
        size = data.shape[1]
        for threads, array, offset in self._locate(address, size, "write"):
            array[offset[:, None] + np.arange(size)] = data[threads]

    def _locate(self, address: Values, size: int, what: str) -> Iterator[tuple[Mask, Values, Values]]:
        """Yield the threads that access an array, the array, and their offsets into it."""
        which = np.searchsorted(np.asarray(self._bases, np.uint64), address, side="right").astype(np.int64) - 1
        for number in np.unique(which):
            threads = which == number
            if number < 0:
                raise PtxError(f"global {what}: address {int(address[threads][0]):#x} is in no array")
            array = self._arrays[number]
            offset = (address[threads] - np.uint64(self._bases[number])).astype(np.int64)
            beyond = offset + size > array.size
            if beyond.any():
                raise PtxError(
                    f"global {what} out of bounds: {int(beyond.sum())} thread(s), the first at byte "
                    f"{int(offset[beyond][0])} (+{size}) of an array of {array.size} bytes"
                )
            yield threads, array, offset


_NOBODY, _SEVERAL = -1, -2


class Shared:
    """The shared memory of blocks: for every byte whether it was written, and who accessed it since which barrier."""

    def __init__(self, blocks: int, size: int, check_races: bool) -> None:
        self.check_races = check_races
        self._data = np.zeros((blocks, size), np.uint8)
        self._written = np.zeros((blocks, size), bool)
        self._writer, self._reader = (np.full((blocks, size), _NOBODY, np.int32) for _ in range(2))
        # The time of the last access, counted in barriers.
        self._write_epoch, self._read_epoch = (np.full((blocks, size), -1, np.int64) for _ in range(2))

    def read(self, block: Values, offset: Values, size: int, warp: Values, epoch: Values) -> Values:
        """Return the bytes [threads, size] at offsets into the memory of the threads' blocks."""
        place = self._place(block, offset, size, "read")
        if not self._written[place].all():
            raise PtxError("read of shared memory that nothing wrote")
        if self.check_races:
            mine, now = warp[:, None], epoch[:, None]
            if ((self._write_epoch[place] == now) & (self._writer[place] != mine)).any():
                raise PtxError("shared-memory race: a read of another warp's write with no barrier between")
            others = (self._read_epoch[place] == now) & (self._reader[place] != mine)
            reader = np.where(others, _SEVERAL, mine)
            self._reader[place] = reader
            self._read_epoch[place] = now
            # Where two warps read a byte in this very call, one of them overwrote the other.
            overwritten = self._reader[place] != reader
            if overwritten.any():
                self._reader[np.broadcast_to(place[0], overwritten.shape)[overwritten], place[1][overwritten]] = (
                    _SEVERAL
                )
        return self._data[place]

    def write(self, block: Values, offset: Values, data: Values, warp: Values, epoch: Values) -> None:
        """Write bytes [threads, size] to offsets into the memory of the threads' blocks."""
        place = self._place(block, offset, data.shape[1], "write")
        mine, now = warp[:, None], epoch[:, None]
        if self.check_races:
            after_write = (self._write_epoch[place] == now) & (self._writer[place] != mine)
            after_read = (self._read_epoch[place] == now) & (self._reader[place] != mine)
            if after_write.any() or after_read.any():
                raise PtxError("shared-memory race: a write over another warp's access with no barrier between")
        self._data[place] = data
        self._written[place] = True
        self._writer[place] = mine
        self._write_epoch[place] = now
        # Two warps that write a byte in this very call may write the same value, as those of Triton do.
        if self.check_races and ((self._writer[place] != mine) & (self._data[place] != data)).any():
            raise PtxError("shared-memory race: two warps write one byte with no barrier between")

    def _place(self, block: Values, offset: Values, size: int, what: str) -> tuple[Values, Values]:
        beyond = (offset < 0) | (offset + size > self._data.shape[1])
        if beyond.any():
            raise PtxError(
                f"shared {what} out of bounds: byte {int(offset[beyond][0])} (+{size}) of {self._data.shape[1]}"
            )
        return block[:, None], offset[:, None] + np.arange(size)

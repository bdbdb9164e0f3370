"""The threads of some blocks of a launch: their registers, and memory as they see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ptxsim.memory import WINDOWS, Memory, Shared
from ptxsim.parser import Kernel, address_of
from ptxsim.values import NUMPY, PAIRS, UNSIGNED, Mask, PtxError, Values, bf16_to_f32, f32_to_bf16, literal, size_of

# Is told of an access to global memory: address, size, whether it writes, and of each thread block, barriers, warp.
Observer = Callable[[Values, int, bool, Values, Values, Values], None]
Dimensions = tuple[int, int, int]
# The state of a thread that does not run, instead of its next instruction.
WAITS, DONE = 1 << 40, 1 << 41


@dataclass(frozen=True)
class Launch:
    """What all threads of a launch share."""

    kernel: Kernel
    parameters: Values  # bytes
    grid: Dimensions
    block: Dimensions
    memory: Memory
    variables: dict[str, int]  # addresses
    shared_bytes: int
    check_races: bool
    observer: Observer | None

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return int(np.prod(self.block))


class Threads:
    """Some blocks of a launch. Masks and values have an element for each thread, values of vectors a row."""

    def __init__(self, launch: Launch, blocks: Values) -> None:
        kernel = launch.kernel
        self.launch, self.kernel = launch, kernel
        self.in_block, self.blocks = launch.threads, len(blocks)
        n = self.count = self.in_block * self.blocks
        thread = np.tile(np.arange(self.in_block), self.blocks)
        self.block = np.repeat(np.arange(self.blocks), self.in_block)
        self.block_of_grid = np.repeat(blocks, self.in_block)
        self.warp, self.lane = (thread // 32).astype(np.int32), thread % 32
        warps = -(-self.in_block // 32)
        self._warps = self.blocks * warps
        self.warp_of_launch = self.block * warps + self.warp
        self._special = self._special_registers(thread)
        self._symbols = {**launch.variables, **kernel.params.offsets, **kernel.shared.offsets, **kernel.local.offsets}
        self._registers: dict[str, Values] = {}
        self.shared = Shared(self.blocks, kernel.shared.size + launch.shared_bytes, launch.check_races)
        self._local = np.zeros((n, kernel.local.size), np.uint8)
        self.epoch = np.zeros(self.blocks, np.int64)  # barriers that are behind
        self.pc = np.zeros(n, np.int64)  # the next instruction, or one of the states above
        self.barrier, self.resume = np.zeros(n, np.int64), np.zeros(n, np.int64)  # of threads that wait

    def _special_registers(self, thread: Values) -> dict[str, Values]:
        (width, height, _), (grid_width, grid_height, _) = self.launch.block, self.launch.grid
        block = self.block_of_grid
        places = {
            "tid": (thread % width, thread // width % height, thread // (width * height)),
            "ntid": self.launch.block,
            "ctaid": (
                block % grid_width,
                block // grid_width % grid_height,
                block // (grid_width * grid_height),
            ),
            "nctaid": self.launch.grid,
        }
        numbers = {f"%{name}.{axis}": three["xyz".index(axis)] for name, three in places.items() for axis in "xyz"}
        numbers |= {"%laneid": self.lane, "%warpid": self.warp, "%nsmid": 132, "%smid": 0, "%clock": 0}
        numbers |= {"%lanemask_lt": (1 << self.lane) - 1, "%lanemask_le": (2 << self.lane) - 1}
        special = {name: np.broadcast_to(np.asarray(value, np.uint32), self.count) for name, value in numbers.items()}
        return special | {name: np.zeros(self.count, np.uint64) for name in ("%clock64", "%globaltimer")}

    def bits(self, operand: str, size: int) -> Values:
        """Return an operand as unsigned numbers of some bytes; a predicate as it is."""
        if operand.startswith("!"):
            return ~self.bits(operand[1:], size)
        value = self._registers.get(operand)
        if value is None:
            value = self._special.get(operand)
        if value is not None:
            return value if value.dtype == bool or value.dtype.itemsize == size else value.astype(UNSIGNED[size])
        number = literal(operand)
        if number is None:
            number = self._symbols.get(operand)
        if number is not None:
            if size not in UNSIGNED:
                raise PtxError(f"{operand} for an operand of {size} bytes")
            return np.full(self.count, number & ((1 << 8 * size) - 1), UNSIGNED[size])
        if operand.startswith("%"):
            raise PtxError(f"register {operand} is read before anything wrote it")
        raise PtxError(f"unknown operand {operand!r}")

    def get(self, operand: str, type_: str) -> Values:
        """Return an operand as numbers of a type: bfloat16 and pairs of floats as float32."""
        if type_ == "pred":
            number = literal(operand)
            return self.bits(operand, 1) if number is None else np.full(self.count, bool(number))
        if type_ in PAIRS:
            halves = np.ascontiguousarray(self.bits(operand, 4)).view(np.uint16).reshape(-1, 2)
            return bf16_to_f32(halves) if type_ == "bf16x2" else halves.view(np.float16).astype(np.float32)
        value = np.ascontiguousarray(self.bits(operand, size_of(type_)))
        return bf16_to_f32(value) if type_ == "bf16" else value.view(NUMPY[type_])

    def put_bits(self, register: str, value: Values, mask: Mask) -> None:
        """Write what `bits` returns to a register of some threads."""
        if register == "_":
            return
        if value.dtype != bool:
            value = np.ascontiguousarray(value)
            value = value.view(UNSIGNED[value.dtype.itemsize])
        if not mask.all():
            before = self._registers.get(register)
            if before is None or (before.dtype == bool) != (value.dtype == bool):
                before = np.zeros(self.count, value.dtype)
            value = np.where(mask, value, before.astype(value.dtype, copy=False))
        self._registers[register] = value

    def put(self, register: str, value: Values, type_: str, mask: Mask) -> None:
        """Write what `get` returns to a register of some threads, rounded to the type."""
        if type_ in ("bf16", "bf16x2"):
            value = f32_to_bf16(value)
        elif type_ == "f16x2":
            value = value.astype(np.float16)
        elif type_ != "pred":
            value = value.astype(NUMPY[type_], copy=False)
        if type_ in PAIRS:
            value = np.ascontiguousarray(value).view(np.uint32).reshape(-1)
        self.put_bits(register, value, mask)

    def addresses(self, operand: str) -> Values:
        """Return the addresses of an operand [base+offset]."""
        base, offset = address_of(operand)
        return self.bits(base, 8) + np.uint64(offset & 0xFFFF_FFFF_FFFF_FFFF)

    def read(self, space: str, address: Values, size: int, mask: Mask) -> Values:
        """Return the bytes [threads, size] at addresses in a space; zero where the mask is."""
        self._check_alignment(address, size, mask, "read")
        data = np.zeros((self.count, size), np.uint8)
        for where, at, threads in self._in_spaces(space, address, mask):
            if where == "shared":
                block = self.block[threads]
                data[threads] = self.shared.read(
                    block, at.astype(np.int64), size, self.warp[threads], self.epoch[block]
                )
            elif where == "local":
                data[threads] = self._local[self._in_local(threads, at, size)]
            elif where == "param":
                data[threads] = self.launch.parameters[self._in_param(at, size)]
            else:
                self._observe(at, size, False, threads)
                data[threads] = self.launch.memory.read(at, size)
        return data

    def write(self, space: str, address: Values, data: Values, mask: Mask) -> None:
        """Write bytes [threads, size] to addresses in a space."""
        size = data.shape[1]
        self._check_alignment(address, size, mask, "write")
        for where, at, threads in self._in_spaces(space, address, mask):
            if where == "shared":
                block = self.block[threads]
                self.shared.write(block, at.astype(np.int64), data[threads], self.warp[threads], self.epoch[block])
            elif where == "local":
                self._local[self._in_local(threads, at, size)] = data[threads]
            elif where == "param":
                raise PtxError("a write to a parameter")
            else:
                self._observe(at, size, True, threads)
                self.launch.memory.write(at, data[threads])

    @staticmethod
    def _check_alignment(address: Values, size: int, mask: Mask, what: str) -> None:
        if (address[mask] % min(size, 16)).any():
            raise PtxError(f"misaligned {what} of {size} bytes")

    @staticmethod
    def _in_spaces(space: str, address: Values, mask: Mask) -> Iterator[tuple[str, Values, Mask]]:
        """Yield spaces, addresses in them, and the threads that access them; a generic address says which it means."""
        if space != "generic":
            yield space, address[mask], mask
            return
        upper = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
        for name, window in sorted(WINDOWS.items(), key=lambda item: -item[1]):
            base = np.uint64(window)
            threads = mask & (base <= address) & (address <= upper)
            if threads.any():
                yield name, address[threads] - base, threads
            upper = base - np.uint64(1)
        threads = mask & (address <= upper)
        if threads.any():
            yield "global", address[threads], threads

    def _in_local(self, threads: Mask, offset: Values, size: int) -> tuple[Values, Values]:
        if (offset > self._local.shape[1] - size).any():
            raise PtxError(f"local access out of bounds: byte {int(offset.max())} (+{size}) of {self._local.shape[1]}")
        return np.flatnonzero(threads)[:, None], offset[:, None].astype(np.int64) + np.arange(size)

    def _in_param(self, offset: Values, size: int) -> Values:
        length = self.launch.parameters.size
        if (offset > length - size).any():
            raise PtxError(f"parameter read out of bounds: byte {int(offset.max())} (+{size}) of {length}")
        return offset[:, None].astype(np.int64) + np.arange(size)

    def _observe(self, address: Values, size: int, write: bool, threads: Mask) -> None:
        if self.launch.observer is not None:
            block = self.block[threads]
            self.launch.observer(
                address, size, write, self.block_of_grid[threads], self.epoch[block], self.warp[threads]
            )

    def lanes(self, mask: Mask) -> Values:
        """Return for each thread the lanes of its warp that a mask has, as bits."""
        bits = np.bincount(self.warp_of_launch[mask], (1 << self.lane)[mask].astype(np.float64), self._warps)
        of_thread: Values = bits.astype(np.uint32)[self.warp_of_launch]
        return of_thread

    def check_converged(self, wanted: Values, mask: Mask) -> None:
        """Check that every lane that a .sync instruction names and that has not ended is at it.

        Raises:
            PtxError: for a divergent warp.
        """
        here, there = self.lanes(mask), self.lanes(self.pc != DONE)
        missing = mask & ((wanted & there & ~here) != 0)
        if missing.any():
            first = np.flatnonzero(missing)[0]
            raise PtxError(
                f".sync of lanes {int(wanted[first] & there[first]):#x} reached by {int(here[first]):#x} only: "
                "a divergent warp"
            )

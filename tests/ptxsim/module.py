"""A compiled module: finds its kernels and launches them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ptxsim.memory import Memory
from ptxsim.parser import Kernel, parse, parse_kernel
from ptxsim.run import run
from ptxsim.threads import Dimensions, Launch, Observer, Threads
from ptxsim.values import Values

# Blocks run together up to so many threads: NumPy's calls cost more than the work of a few threads.
_THREADS_AT_ONCE = 16384


class Module:
    """The kernels of one PTX text.

    Args:
        ptx: what a compiler printed.
    """

    def __init__(self, ptx: str) -> None:
        self._program = parse(ptx)
        self._kernels: dict[str, Kernel] = {}

    @property
    def names(self) -> list[str]:
        """The names of all kernels, as the compiler mangled them."""
        return list(self._program.entries)

    def kernel(self, pattern: str) -> Kernel:
        """Return the kernel of a name, else the only one whose name fits a regular expression."""
        names = [pattern] if pattern in self.names else [name for name in self.names if re.search(pattern, name)]
        if len(names) != 1:
            raise KeyError(f"{pattern!r} names {len(names)} kernels of {sorted(self.names)}")
        if names[0] not in self._kernels:
            self._kernels[names[0]] = parse_kernel(self._program, names[0])
        return self._kernels[names[0]]

    def launch(
        self,
        kernel: str | Kernel,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        memory: Memory | None = None,
        shared_bytes: int = 0,
        most_steps: int = 2_000_000,
        check_races: bool = True,
        observer: Observer | None = None,
    ) -> int:
        """Run a kernel.

        Args:
            kernel: or what `kernel` finds it by.
            grid: one to three numbers of blocks.
            block: one to three numbers of threads.
            arguments: arrays and None for pointers, NumPy scalars, bytes for structs.
            memory: where pointers among the bytes point; by default memory of this launch alone.
            shared_bytes: dynamic shared memory.
            most_steps: after so many instructions a loop counts as endless.
            check_races: in shared memory.
            observer: is told of every access to global memory.

        Returns:
            How many instructions it took.

        Raises:
            PtxError: for a fault of the kernel.
        """
        found = self.kernel(kernel) if isinstance(kernel, str) else kernel
        memory = memory or Memory()
        variables = {name: memory.add(contents) for name, contents in self._program.variables.items()}
        parameters = _parameters(found, arguments, memory)
        shape = _dimensions(grid), _dimensions(block)
        launch = Launch(found, parameters, *shape, memory, variables, shared_bytes, check_races, observer)
        if not 1 <= launch.threads <= 1024:
            raise ValueError(f"a block has 1 to 1024 threads, got {launch.threads}")
        blocks = np.arange(int(np.prod(launch.grid)))
        at_once = max(1, _THREADS_AT_ONCE // launch.threads)
        groups = [blocks[first : first + at_once] for first in range(0, blocks.size, at_once)]
        return sum(run(Threads(launch, group), most_steps) for group in groups)


def _dimensions(sizes: Sequence[int]) -> Dimensions:
    x, y, z = (*sizes, 1, 1)[:3]
    return int(x), int(y), int(z)


def _parameters(kernel: Kernel, arguments: Sequence[Any], memory: Memory) -> Values:
    """Lay the arguments of a kernel out as it reads them."""
    if len(arguments) != len(kernel.parameters):
        raise ValueError(f"{kernel.name} takes {len(kernel.parameters)} arguments, got {len(arguments)}")
    raw = np.zeros(kernel.params.size, np.uint8)
    for parameter, argument in zip(kernel.parameters, arguments, strict=True):
        data = _bytes_of(argument, memory)
        if len(data) != parameter.size:
            raise ValueError(f"{kernel.name}: {parameter.name} holds {parameter.size} bytes, got {len(data)}")
        offset = kernel.params.offsets[parameter.name]
        raw[offset : offset + len(data)] = np.frombuffer(data, np.uint8)
    return raw


def _bytes_of(argument: Any, memory: Memory) -> bytes:
    if argument is None:
        return bytes(8)
    if isinstance(argument, bytes):
        return argument
    if isinstance(argument, np.ndarray) and argument.ndim:
        return memory.add(argument).to_bytes(8, "little")
    return np.asarray(argument).tobytes()

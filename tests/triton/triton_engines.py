"""How Triton's kernels run in tests: compiled for the GPU that is there; without one, interpreted or simulated.

`interpreter`: Triton's own, on NumPy. `ptx`: Triton compiles for sm_90 and `ptxsim` executes the PTX, with every access
checked; it stands in for Triton's driver, so that launchers, specialization and compiler are the ones of a GPU.
"""

from __future__ import annotations

import functools
import importlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import ptxsim
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.cache import get_cache_manager

from benchmarks.triton_host import NoGpu

PACKAGE = "lesa_kernels.backends.triton"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@functools.cache
def kernels(interpreted: bool) -> ModuleType:
    """Import the package anew, its kernels to be interpreted or compiled: Triton decides that where it decorates."""
    mine = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(PACKAGE)}
    try:
        with triton.knobs.runtime.scope():
            triton.knobs.runtime.interpret = interpreted
            return importlib.import_module(PACKAGE)
    finally:
        for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
            del sys.modules[name]
        sys.modules.update(mine)


@functools.cache
def mend_interpreter() -> None:
    """Let numbers be bounds of loops in the interpreter of Triton 3.6: NumPy 2.4 takes no array of one for a number."""
    if not triton.__version__.startswith("3.6."):
        return
    patch = triton_interpreter._patch_lang_tensor

    def patched(tensor: type, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda number: number.handle.data.item())

    triton_interpreter._patch_lang_tensor = patched


def shared_tests(of_ops: ModuleType) -> dict[str, Any]:
    """Return the tests of a file of tests/ops, and a fixture that puts Triton's launchers in the place of its `ops`."""

    @pytest.fixture(autouse=True)
    def _triton_serves(lesa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(of_ops, "ops", lesa)

    tests = {name: each for name, each in vars(of_ops).items() if name.startswith("test_")}
    return {**tests, "_triton_serves": _triton_serves}


@contextmanager
def interpreter() -> Iterator[ModuleType]:
    """Run kernels in Triton's interpreter, whose reductions are quick only for the functions that it knows."""
    mend_interpreter()
    package = kernels(interpreted=True)
    before, tl.standard._sum_combine = tl.standard._sum_combine, package.tiles.add
    try:
        with np.errstate(all="ignore"):
            yield package
    finally:
        tl.standard._sum_combine = before


@contextmanager
def simulator() -> Iterator[ModuleType]:
    """Run compiled kernels on the simulator."""
    runtime = triton.runtime.driver
    before, runtime._active = runtime._active, driver()
    driver().begin()
    try:
        with np.errstate(all="ignore"):
            yield kernels(interpreted=False)
    finally:
        runtime._active = before


@functools.cache
def driver() -> Simulator:
    """Return the simulator: one for all tests, since kernels keep the launcher that they were compiled with."""
    return Simulator()


@contextmanager
def on_gpu() -> Iterator[ModuleType]:
    """Run compiled kernels on the GPU."""
    yield importlib.import_module(PACKAGE)


@dataclass(frozen=True)
class Compiled:
    """What Triton made of one kernel for one specialization."""

    name: str
    signature: dict[str, Any]
    ptx: str
    cubin: bytes
    warps: int
    shared: int

    def count(self, pattern: str) -> int:
        """Return how many instructions of the PTX fit a pattern."""
        return len(re.findall(pattern, self.ptx))

    def resources(self) -> dict[str, int]:
        """Return registers, stack and local memory, as the assembler reports them."""
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


class Simulator(NoGpu):
    """Stands in for Triton's driver: what compiled kernels launch is simulated."""

    def __init__(self) -> None:
        super().__init__()
        self.compilations = 0
        self.begin()

    def begin(self) -> None:
        """Forget the memory and the launches of earlier tests."""
        self.launches: list[Compiled] = []
        self._memory = ptxsim.Memory()
        self._alive: list[Any] = []

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 1}

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Return what launches one compiled kernel."""
        self.compilations += 1
        files = get_cache_manager(metadata.hash)
        ptx = Path(files.get_file(f"{metadata.name}.ptx")).read_text()
        cubin = Path(files.get_file(f"{metadata.name}.cubin")).read_bytes()
        compiled = Compiled(metadata.name, source.signature, ptx, cubin, metadata.num_warps, metadata.shared)
        module = ptxsim.Module(ptx)
        kernel = module.kernel(metadata.name)

        def launch(x: int, y: int, z: int, *arguments: Any) -> None:
            values = arguments[len(arguments) - len(source.signature) :]
            self.launches.append(compiled)
            flat = [*self._flat(tuple(source.signature.values()), values), None, None]
            block, accesses = (32 * compiled.warps,), ptxsim.GlobalAccesses()
            given = {"memory": self._memory, "shared_bytes": compiled.shared, "observer": accesses.add}
            module.launch(kernel, (x, y, z), block, flat, **given)
            accesses.check()

        return launch

    def _flat(self, kinds: Sequence[Any], values: Sequence[Any]) -> Iterator[Any]:
        """Parameters as the simulator takes them; constants are not among a kernel's."""
        for kind, value in zip(kinds, values, strict=True):
            if isinstance(kind, tuple):
                yield from self._flat(kind, value)
            elif kind.startswith("*"):
                yield np.uint64(self._address(value))
            elif kind != "constexpr":
                yield {"i32": np.int32, "i64": np.int64, "fp32": np.float32}[kind](value)

    def _address(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        array = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self._alive.append(array)
        return self._memory.add(array) + tensor.storage_offset() * tensor.element_size()

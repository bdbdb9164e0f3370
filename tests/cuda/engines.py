"""Two ways to run the CUDA kernels without a GPU, host side included; the same tests run on both.

`ptx`: nvcc compiles, the simulator `ptxsim` executes the PTX and finds races, divergence and accesses out of bounds.
`host`: g++ compiles the same sources under AddressSanitizer and UBSan, with a shim for threads, barriers and shuffles.
Speed is not what either tells.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ptxsim
from arrays import Array
from filelock import FileLock

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
CSRC = REPOSITORY / "csrc"
SANITIZERS = "-fsanitize=address,undefined"


class Unavailable(Exception):
    """This machine cannot run an engine; the text says why."""


class TensorView(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.POINTER(ctypes.c_int64)), ("bytes", ctypes.c_int64))


class Values(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("column_stride", ctypes.c_int64),
        ("is_float", ctypes.c_bool),
    )


class Result(ctypes.Structure):
    """Where a gradient goes."""

    _fields_ = (("data", ctypes.c_void_p), ("is_float", ctypes.c_bool))


def integers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


class Engine(ABC):
    """The host library of the kernels: calls its C functions (*_entries.cpp) on arrays of one test."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._alive: list[np.ndarray] = []
        self.launches: list[str] = []  # kernels of the last call, where they have names

    @abstractmethod
    def address(self, storage: np.ndarray) -> int:
        """The address by which kernels know a storage."""

    @abstractmethod
    def begin(self) -> None:
        """Forget the memory of earlier tests."""

    @abstractmethod
    def finish(self) -> None:
        """Raise what went wrong in a launch."""

    def pointer(self, array: Array | None) -> ctypes.c_void_p:
        if array is None:
            return ctypes.c_void_p(None)
        self._alive.append(array.storage)
        return ctypes.c_void_p(self.address(array.storage) + array.offset * array.storage.itemsize)

    def view(self, array: Array) -> TensorView:
        return TensorView(self.pointer(array), integers(array.strides), array.storage.itemsize)

    def views(self, arrays: Sequence[Array]) -> Any:
        return (TensorView * len(arrays))(*map(self.view, arrays))

    def values(self, array: Array | None) -> Values:
        """A parameter [rows, columns], or none."""
        if array is None:
            return Values(None, 0, 0, False)
        row, column = array.strides
        return Values(self.pointer(array), row, column, array.dtype == "float32")

    def call(self, function: str, *arguments: Any) -> None:
        """Call a C function that returns a message where it fails.

        Raises:
            RuntimeError: with that message, or what a launch met.
        """
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_char_p
        message = entry(*(argument.encode() if isinstance(argument, str) else argument for argument in arguments))
        self._alive.clear()
        self.finish()
        if message:
            raise RuntimeError(message.decode())

    def number(self, function: str, *arguments: Any) -> int:
        """Call a C function that returns a number."""
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_int64
        return int(entry(*arguments))

    def fail_launches(self, error: int) -> None:
        self._library.fail_launches(error)

    @abstractmethod
    def check_launches(self, *names: str) -> None:
        """Check which kernels the last call launched, by parts of their names."""


class Host(Engine):
    """Kernels compiled by g++: memory is memory. Needs libasan in the process before Python's allocations."""

    def begin(self) -> None:
        pass

    def finish(self) -> None:
        pass  # a sanitizer's report ends the process

    def check_launches(self, *names: str) -> None:
        pass  # kernels that g++ compiled have no names

    def address(self, storage: np.ndarray) -> int:
        return storage.ctypes.data


class Simulated(Engine):
    """Kernels compiled by nvcc, whose launches are simulated."""

    def __init__(self, library: Path, ptx: Sequence[Path]) -> None:
        super().__init__(library)
        self._memory = ptxsim.Memory()
        self._error: BaseException | None = None
        callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
        self._callback = callback(self._launch)
        self._library.on_launch(self._callback)
        texts = [path.read_text() for path in ptx]
        modules = [ptxsim.Module(text) for text in texts if ".entry" in text]  # a file may hold host code alone
        self._modules = {name: module for module in modules for name in module.names}

    def begin(self) -> None:
        self._memory = ptxsim.Memory()

    def call(self, function: str, *arguments: Any) -> None:
        self.launches, self._error = [], None
        super().call(function, *arguments)

    def check_launches(self, *names: str) -> None:
        assert len(self.launches) == len(names), self.launches
        assert all(name in launch for name, launch in zip(names, self.launches, strict=True)), self.launches

    def finish(self) -> None:
        if self._error is not None:
            raise self._error

    def address(self, storage: np.ndarray) -> int:
        return self._memory.add(storage)

    def _launch(self, name: bytes, blocks: int, threads: int, task: int) -> None:
        try:
            module = self._modules[name.decode()]
            kernel = module.kernel(name.decode())
            self.launches.append(kernel.name)
            arguments = [ctypes.string_at(task, kernel.parameters[0].size)]
            accesses = ptxsim.GlobalAccesses()
            module.launch(kernel, (blocks,), (threads,), arguments, memory=self._memory, observer=accesses.add)
            accesses.check()
        except BaseException as error:
            self._error = self._error or error


def _run(command: Sequence[str | Path], folder: Path) -> None:
    result = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def _run_all(commands: Sequence[Sequence[str | Path]], folder: Path) -> None:
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: _run(command, folder), commands))


def _kernel_sources(folder: Path) -> list[Path]:
    """Write the files that hold kernels, one for each op and dtype, as CMakeLists.txt does."""
    template, sources = (CSRC / "cuda" / "kernels.cu.in").read_text(), []
    for op in sorted(path.stem for path in (CSRC / "cuda").glob("*.cuh") if path.with_suffix(".cpp").exists()):
        for feature in ("bfloat16", "float16", "float"):
            sources.append(folder / f"{op}_{feature}.cu")
            text = template.replace("@OP@", op).replace("@CLASS@", op.capitalize()).replace("@FEATURE@", feature)
            sources[-1].write_text(text)
    return sources


def _folder_for(engine: str, cache: Path) -> Path:
    """A folder that is named after the contents of all that goes into a build."""
    text = hashlib.sha256()
    for path in sorted([*CSRC.rglob("*.*"), *HERE.rglob("*.cpp"), *HERE.rglob("*.h"), Path(__file__)]):
        text.update(path.name.encode() + path.read_bytes())
    return cache / f"{engine}-{text.hexdigest()[:16]}"


def _built(engine: str, cache: Path, build: Callable[[Path], None]) -> Path:
    """Return the folder of a build, made now unless it is there; two test runs at once wait for each other."""
    folder = _folder_for(engine, cache)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "kernels.so").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(folder)
            (folder / "partial.so").rename(folder / "kernels.so")
    return folder


def build_ptx(cache: Path) -> Simulated:
    """Compile with nvcc to PTX for sm_90 and to a host library, and simulate.

    Raises:
        Unavailable: without nvcc.
    """
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise Unavailable("nvcc is not on the PATH")

    def build(folder: Path) -> None:
        sources = _kernel_sources(folder)
        common = [nvcc, "-std=c++20", f"-I{CSRC}", "-Xcompiler=-fPIC", "-cudart=none"]
        device = ["--expt-relaxed-constexpr", "-arch=compute_90", "-code=compute_90", "--keep", "--keep-dir", folder]
        objects = [f"{source.stem}.o" for source in sources]
        _run_all([[*common, *device, "-c", source, "-o", f"{source.stem}.o"] for source in sources], folder)
        link = [*common, "-shared", "-Xlinker=-Bsymbolic,-z,defs", *sorted(HERE.glob("*.cpp")), *objects]
        _run([*link, "-o", "partial.so"], folder)

    folder = _built("ptx", cache, build)
    return Simulated(folder / "kernels.so", sorted(folder.glob("*.ptx")))


def build_host(cache: Path) -> Host:
    """Compile with g++ under the sanitizers.

    Raises:
        Unavailable: without g++ or its sanitizers.
    """
    if sanitizer_runtime() is None:
        raise Unavailable("g++ with libasan is not installed")

    def build(folder: Path) -> None:
        # What nvcc needs for its device pass, g++ does not know.
        quiet = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
        flags = ["g++", "-std=c++20", "-O0", "-g1", "-fPIC", SANITIZERS, "-fno-sanitize-recover=undefined", *quiet]
        includes = [f"-I{HERE / 'shim'}", f"-I{CSRC}", f"-I{HERE}"]
        sources = [*_kernel_sources(folder), *sorted(HERE.glob("*_entries.cpp")), *sorted(HERE.glob("shim/*.cpp"))]
        compile_ = [*flags, *includes, "-x", "c++", "-c"]
        _run_all([[*compile_, source, "-o", f"{source.stem}.o"] for source in sources], folder)
        objects = [f"{source.stem}.o" for source in sources]
        _run([*flags, "-shared", "-Wl,-z,nodelete", *objects, "-o", "partial.so"], folder)

    return Host(_built("host", cache, build) / "kernels.so")


@functools.cache
def sanitizer_runtime() -> str | None:
    """The libraries to preload, so that NumPy's arrays have AddressSanitizer's borders around them.

    libstdc++ is among them because libasan looks for its exceptions before Python loads it.
    """
    if shutil.which("g++") is None:
        return None
    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = ["g++", f"-print-file-name={name}"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return " ".join(paths) if all(Path(path).is_absolute() for path in paths) else None

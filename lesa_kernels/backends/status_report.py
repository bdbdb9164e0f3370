"""Reports which kernel serves which op on which device, and why: `lesa.status()`."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lesa_kernels import ops
from lesa_kernels.backends.libraries import Library, in_a_line, inspection_module, libraries, read_record
from lesa_kernels.backends.registration import Choice, choices, why_triton_fails

REFERENCE = "reference (plain torch)"
TRITON = "Triton"
_DEVICES = {"CPU": "_cpu", "CUDA": "_cuda"}
_INSTRUCTION_SETS = {"avx512": "AVX-512", "avx2": "AVX2"}
_OLDEST_GPU = 80  # nvcc converts float32 to bfloat16 from there on
_WITHOUT_CUDA = "install again with LESA_BUILD=cpu: then Triton serves, or the reference where Triton cannot"


@dataclass(frozen=True)
class KernelStatus:
    """What serves one op on one kind of device.

    Args:
        op: str, as in torch.ops.lesa.
        device: str, "CPU" or "CUDA"; "XPU" too where torch was built for it.
        kernel: str, as in "C++ AVX-512", "CUDA C++", "Triton" or "reference (plain torch)".
        reason: str, why this one.
    """

    op: str
    device: str
    kernel: str
    reason: str


@dataclass(frozen=True)
class Status:
    """Which kernels serve, and why; `print` shows it as a table.

    Args:
        versions: mapping, name -> version of the package, torch and Python.
        kernels: tuple, one entry for each op and device.
        libraries: tuple, the compiled libraries of ops, then the inspection module.
        build: mapping, what the build wrote down; empty if the package was never built.
        notes: tuple of str, what else a user should know.
    """

    versions: Mapping[str, str]
    kernels: tuple[KernelStatus, ...]
    libraries: tuple[Library, ...]
    build: Mapping[str, Any]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Return the table, the libraries below it, and what else runs where."""
        served = {(kernel.op, kernel.device): kernel.kernel for kernel in self.kernels}
        names = dict.fromkeys(kernel.op for kernel in self.kernels)
        devices = dict.fromkeys(kernel.device for kernel in self.kernels)
        rows = [["op", *devices], *([op, *(served[op, device] for device in devices)] for op in names)]
        lines = ["   ".join(f"{name} {version}" for name, version in self.versions.items()), ""]
        lines += [*_columns(rows), "", "Every other device runs the reference.", ""]
        lines += _columns([library.name, library.reason] for library in self.libraries)
        for library in self.libraries:
            lines += [f"  {library.name} {key}: {_text(value)}" for key, value in library.facts.items()]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _text(value: object) -> str:
    """Return a fact as it reads best in a line."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}={_text(item)}" for key, item in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _columns(rows: Iterable[Iterable[str]]) -> list[str]:
    """Return rows of cells as lines with aligned columns."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _label(library: Library) -> str:
    """Return the name of a library's kernels, with the instruction set that was chosen on this machine."""
    if library.name == "_cuda":
        return "CUDA C++"
    chosen = library.facts.get("chosen", "(which one is unknown)")  # csrc/cpu/isa.cpp
    return f"C++ {_INSTRUCTION_SETS.get(chosen, chosen)}"


def _serving(op: str, device: str, library: Library | None, triton: Choice | None) -> KernelStatus:
    """Ask torch's dispatcher what serves an op on a device."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"lesa::{op}", device):
        if triton is not None and triton.registered:
            return KernelStatus(op, device, TRITON, triton.reason)
        if library is not None:
            return KernelStatus(op, device, _label(library), f"{library.name} is loaded")
    reasons = []
    if library is not None:
        reasons.append(
            f"{library.name} has no kernel for it" if library.loaded else f"{library.name}: {library.reason}"
        )
    if triton is not None and triton.present and not (library is not None and library.loaded):
        reasons.append(f"Triton: {triton.reason}")
    return KernelStatus(op, device, REFERENCE, "; ".join(reasons))


def _driver() -> tuple[int, int] | None:
    """Return the newest CUDA that the driver runs; None without a driver."""
    number = getattr(torch._C, "_cuda_getDriverVersion", int)()
    return (number // 1000, number % 1000 // 10) if number else None


def _old_driver(library: Library) -> list[str]:
    """Return a note where the driver is of an older CUDA than the compiler of the CUDA library.

    Within one major version every driver runs the machine code of every compiler.
    """
    release, driver = str(library.facts["cuda"]), _driver()
    major = int(release.split(".")[0])
    newest = driver[0] if driver else int(str(torch.version.cuda).split(".")[0])
    if newest >= major:
        return []
    said = f"the driver runs CUDA {driver[0]}.{driver[1]} at most" if driver else f"torch is for CUDA {newest}"
    return [
        f"_cuda was compiled by nvcc {release} and needs a driver for CUDA {major} (`nvidia-smi` shows which),"
        f" {said}: update the driver, or set CUDACXX to an nvcc of CUDA {newest} and install again, or {_WITHOUT_CUDA}"
    ]


def _unfit_gpus(library: Library) -> list[str]:
    """Return a note for each GPU that the machine code in the CUDA library does not fit."""
    held = sorted(int(architecture) for architecture in library.facts["architectures"])
    notes = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        number = 10 * major + minor
        if number < held[0]:
            name = torch.cuda.get_device_name(index)
            needed = f"set CUDAARCHS={number} and install again" if number >= _OLDEST_GPU else _WITHOUT_CUDA
            notes.append(f"cuda:{index} ({name}) is sm_{number}, the kernels start at sm_{held[0]}: {needed}")
    return notes


def _cuda_notes(library: Library) -> list[str]:
    """Return what keeps the loaded CUDA library from running on this machine's GPUs."""
    if not library.loaded or not library.facts:
        return []
    try:
        return [*_old_driver(library), *(_unfit_gpus(library) if torch.cuda.is_available() else [])]
    except Exception as error:  # a GPU that is busy or broken, a process that was forked, facts of another build
        return [f"whether _cuda fits the driver and the GPUs is unknown: {in_a_line(error)}"]


def _triton_notes(chosen: Iterable[Choice]) -> list[str]:
    """Return a note where the dispatcher holds Triton's kernels and Triton does not work."""
    devices = [choice.device for choice in chosen if choice.registered]
    reason = why_triton_fails() if devices else None
    if reason is None:
        return []
    return [f"every op fails on {' and '.join(devices)}: Triton cannot be imported ({reason}): repair or remove it"]


def _version() -> str:
    """Return the installed package's version, or say that this copy was imported without being installed."""
    try:
        return importlib.metadata.version("lesa-kernels") or "(unknown: the package's metadata name none)"
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
    except Exception as error:  # importlib.metadata promises nothing about damaged files
        return f"(unknown: {in_a_line(error)})"


def status() -> Status:
    """Return which kernel serves which op on which device, and why.

    Returns:
        The state of this process; `print(lesa.status())` shows it as a table.
    """
    found = {library.name: library for library in libraries()}
    module, reason = inspection_module()
    versions = {
        "lesa-kernels": _version(),
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    by_triton = choices()
    others = [device for device, choice in by_triton.items() if choice.present and device not in _DEVICES]
    kernels = [
        _serving(op, device, found.get(_DEVICES.get(device, "")), by_triton.get(device))
        for op in ops.OPS
        for device in (*_DEVICES, *others)
    ]
    inspection = Library("_inspect", module is not None, reason)
    build = read_record()
    damaged = [build["damaged"]] if "damaged" in build else []
    notes = [*damaged, *build.get("notes", ()), *_cuda_notes(found["_cuda"]), *_triton_notes(by_triton.values())]
    return Status(versions, tuple(kernels), (*found.values(), inspection), build, tuple(notes))

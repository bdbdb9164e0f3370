"""Finds the compiled libraries beside the package, loads them once and reads the facts of their build."""

from __future__ import annotations

import ctypes
import importlib
import json
import struct
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Library:
    """One compiled library, as it was found when the package was imported.

    Args:
        name: str, the file's name without its suffix.
        loaded: bool, whether its kernels are in the dispatcher.
        reason: str, why it is loaded or not.
        facts: mapping, the library's build and its choices at run time; empty if not loaded.
    """

    name: str
    loaded: bool
    reason: str
    facts: Mapping[str, Any] = field(default_factory=dict)


_libraries: dict[str, Library] = {}


def read_record(folder: Path = PACKAGE) -> dict[str, Any]:
    """Return what the build wrote down (`_build_info.json`); empty where the package was never built.

    A record that cannot be read is no error: it becomes {"damaged": what to do}.
    """
    path = folder / "_build_info.json"
    if not path.exists():
        return {}
    try:
        record = _mapping(path.read_text(encoding="utf-8"))
        if not (isinstance(record.get("skipped"), dict) and isinstance(record.get("notes", []), list)):
            raise ValueError("`skipped` is no object or `notes` no list")
    except (OSError, ValueError) as error:
        return {"damaged": f"the build's record {path.name} is damaged ({in_a_line(error)}): install the package again"}
    return record


def in_a_line(error: BaseException) -> str:
    """Return an error's type and text, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _mapping(text: str) -> dict[str, Any]:
    """Return the object that a JSON text holds, and refuse every other value."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object was expected, got {type(value).__name__}")
    return value


def _why_not_built(record: Mapping[str, Any], name: str) -> str:
    if not record:
        return "not built: this copy of the package was not installed (run `pip install -e .`)"
    if "damaged" in record:
        return f"its file is not there, and {record['damaged']}"
    reason = record["skipped"].get(name.removeprefix("_"))
    return f"not built: {reason}" if reason else "was built, but its file is gone: install the package again"


def _check_whole(path: Path) -> None:
    """Check that a library's file was not cut short: the system's loader would end the process with SIGBUS.

    Raises:
        OSError: when a file is empty or an ELF file ends before its table of sections, with which linkers close it.
    """
    with path.open("rb") as file:
        header = file.read(64)
    size = whole = path.stat().st_size
    if header.startswith(b"\x7fELF\x02\x01") and len(header) == 64:  # 64 bits, little endian
        start, entry, entries = struct.unpack_from("<Q10xHH", header, 40)
        whole = start + entry * entries
    if size < max(whole, 64):
        raise OSError(f"{path.name} was cut short, it has {size} bytes: install the package again")


def load_library(name: str, folder: Path = PACKAGE, cuda: str | None = torch.version.cuda) -> Library:
    """Load one library of ops into torch's dispatcher.

    Args:
        name: str, "_cpu" or "_cuda".
        folder: path, where its file and the build's record are.
        cuda: str or None, the CUDA version of the running torch.

    Returns:
        The library and why it is loaded or not. A file that should load and does not is a warning as well.
    """
    path = folder / f"{name}.so"
    if not path.exists():
        return Library(name, False, _why_not_built(read_record(folder), name))
    if name == "_cuda" and cuda is None:
        return Library(name, False, f"built, not loaded: torch {torch.__version__} has no CUDA")
    try:
        _check_whole(path)
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        reason = f"failed to load: {error.__cause__ or error}"
        warnings.warn(
            f"lesa_kernels: {path.name} {reason}; status() shows what serves instead", RuntimeWarning, stacklevel=2
        )
        return Library(name, False, reason)
    return _with_facts(Library(name, True, "loaded"), path)


def _with_facts(library: Library, path: Path) -> Library:
    """Ask a loaded library for its facts, through C: this works on every Python, as the library itself does."""
    try:
        function = getattr(ctypes.CDLL(str(path)), f"lesa{path.stem}_info")
        function.restype = ctypes.c_char_p
        return replace(library, reason="loaded", facts=_mapping((function() or b"").decode()))
    except (OSError, AttributeError, ValueError) as error:
        # Its kernels are in the dispatcher all the same.
        reason = f"loaded, but its facts cannot be read ({in_a_line(error)}): install the package again"
        return replace(library, reason=reason, facts={})


def load() -> None:
    """Load every library that is there."""
    for name in ("_cpu", "_cuda"):
        if name not in _libraries:
            _libraries[name] = load_library(name)


def libraries() -> tuple[Library, ...]:
    """Return the libraries that `load` found, with their facts as they are now."""
    return tuple(
        _with_facts(library, PACKAGE / f"{name}.so") if library.loaded else library
        for name, library in _libraries.items()
    )


def inspection_module(folder: Path = PACKAGE) -> tuple[ModuleType | None, str]:
    """Import the pybind11 module, which unlike the libraries of ops is tied to the one Python it was built for.

    Returns:
        The module, or None where there is none that this Python can load, and the reason.
    """
    files = sorted(folder.glob("_inspect.*.so"))
    if not files:
        return None, _why_not_built(read_record(folder), "_inspect")
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    if not any(file.name.startswith(f"_inspect.{tag}-") for file in files):
        return None, f"built for {files[0].name.split('.')[1]}, this is {tag}: pybind11 modules fit one Python only"
    try:
        for file in files:
            _check_whole(file)
        return importlib.import_module("lesa_kernels._inspect"), "loaded"
    except (ImportError, SystemError, OSError) as error:
        return None, f"failed to load: {in_a_line(error)}"

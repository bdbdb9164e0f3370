"""The library of CPU kernels, through C: which instruction sets it has, and which one runs."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import pytest

import lesa_kernels
from lesa_kernels.backends import libraries

ISAS = ["avx512", "avx2", "baseline"]
LIBRARY = next(library for library in lesa_kernels.status().libraries if library.name == "_cpu")
needs_library = pytest.mark.skipif(not LIBRARY.loaded, reason=f"_cpu: {LIBRARY.reason}")


def native() -> ctypes.CDLL:
    """Return the library with the types of its functions."""
    library = ctypes.CDLL(str(libraries.PACKAGE / "_cpu.so"))
    library.lesa_cpu_info.restype = ctypes.c_char_p
    return library


def facts() -> dict[str, Any]:
    """Return what the library says of its build and of its choices now."""
    found: dict[str, Any] = json.loads(native().lesa_cpu_info())
    return found

"""Lets ATEN_CPU_CAPABILITY, which chooses the instruction set of torch, choose that of the C++ kernels as well."""

from __future__ import annotations

import ctypes
import os

from lesa_kernels.backends import libraries


def follow_torch() -> None:
    """Give the C++ kernels of this process the instruction set that torch was told to use.

    Raises:
        ValueError: if there is none of that name.
    """
    wanted, library = os.environ.get("ATEN_CPU_CAPABILITY"), libraries.PACKAGE / "_cpu.so"
    if wanted is None or not library.exists():
        return
    isa = "baseline" if wanted == "default" else wanted
    if ctypes.CDLL(str(library)).lesa_cpu_set_isa(isa.encode()):
        raise ValueError(f"ATEN_CPU_CAPABILITY: the processor or the library of C++ kernels lacks {wanted}")

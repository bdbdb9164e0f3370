"""Fills torch's dispatcher with kernels, once, and reports which kernel serves which device and why.

Only this package knows the compiled libraries and Triton. Everything else calls `torch.ops.lesa`.
"""

from __future__ import annotations

from lesa_kernels.backends import libraries, registration
from lesa_kernels.backends.status_report import KernelStatus, Status, status


def load() -> None:
    """Load every library that is there, then Triton's kernels where none of them serves.

    `lesa_kernels` calls this once, after the ops are declared.
    """
    libraries.load()
    registration.load(libraries.libraries())


__all__ = ["KernelStatus", "Status", "load", "status"]

"""Fills torch's dispatcher with the compiled kernels, once, and tells which kernel serves which device and why.

Only this package knows the compiled libraries. Everything else calls `torch.ops.lesa`.
"""

from __future__ import annotations

from lesa_kernels.backends.libraries import load
from lesa_kernels.backends.report import KernelStatus, Status, status

__all__ = ["KernelStatus", "Status", "load", "status"]

"""Names the device that a measurement ran on."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch


def device_name(device: torch.device) -> str:
    """Return the model name of a GPU or, for any other device, of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return found.group(1) if found else platform.machine()

"""Names the machine that a measurement ran on, and limits the threads of small models."""

from __future__ import annotations

import platform
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

# Work on smaller features is done with one thread: on busy cores two took up to 25 times as long.
MANY_ELEMENTS = 1 << 20


def device_name(device: torch.device) -> str:
    """Return the model name of a GPU or, for any other device, of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return found.group(1) if found else platform.machine()


@contextmanager
def one_thread() -> Generator[None, None, None]:
    """Let torch compute with one CPU thread: a small model loses more while threads wait for each other than it gains.

    With two threads on two busy cores, a training of seconds was not done after minutes. The number is the process's: a
    Python thread that first uses torch within the block keeps it.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

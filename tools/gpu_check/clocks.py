"""Records the GPU's clocks, power and temperature while a check runs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tools.gpu_check.settings import CLOCKS, Settings

FIELDS = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu"


@contextmanager
def recorded(settings: Settings) -> Iterator[None]:
    """Write a line every second; the driver stays awake between the processes of the phases, too."""
    if settings.device == "cpu" or shutil.which("nvidia-smi") is None:
        yield
        return
    command = ["nvidia-smi", f"--query-gpu={FIELDS}", "--format=csv", "-l", "1", "-f", str(settings.out / CLOCKS)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()

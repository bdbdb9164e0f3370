"""Collects the facts of the machine for the report; run as a program it prints them as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.results import commit
from lesa_kernels.machine import device_name
from tools.gpu_check.settings import PACKED

SHOWN_PACKAGES = ("triton", "numpy", "diffusers", "pytest", "hypothesis")


def _first_line_with(word: str, *command: str) -> str:
    """Return the line of a tool's output that holds a word; says so where the tool is missing."""
    if shutil.which(command[0]) is None:
        return "not found"
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return next((line.strip() for line in output.splitlines() if word in line), "says nothing")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts(device: torch.device, pack: Path) -> dict[str, str]:
    """Return name -> value of what a reader needs to judge the figures.

    Args:
        device: that is checked.
        pack: folder whose record names the commit where this copy is no repository.
    """
    here, packed = commit(), pack / PACKED
    carried = json.loads(packed.read_text())["commit"] if packed.exists() else here
    found = {
        "device": device_name(device),
        "system": platform.platform(),
        "cores": str(len(os.sched_getaffinity(0))),
        "Python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        **{package: _version(package) for package in SHOWN_PACKAGES},
        "nvcc": _first_line_with("release", "nvcc", "--version"),
        "commit": carried if here == "unknown" else here,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        found |= {
            "GPUs": str(torch.cuda.device_count()),
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "GPU memory": f"{properties.total_memory / 1e9:.1f} GB",
            "L2 cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
            "driver, greatest clocks, power limit": _first_line_with("", "nvidia-smi", query, "--format=csv,noheader"),
        }
    return found


if __name__ == "__main__":
    wanted, folder = torch.device(sys.argv[1]), Path(sys.argv[2])
    if wanted.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no CUDA device here; `--device cpu` is a dry run without one")
    print(json.dumps(facts(wanted, folder)))

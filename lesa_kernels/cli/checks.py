"""What must be there before a command starts."""

from __future__ import annotations

import importlib.util
import re

import typer


def check_modules(what: str, *modules: str) -> None:
    """Refuse to start where a module is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise typer.BadParameter(f"{what} needs {module}: pip install -e .[train]")


def check_device(device: str) -> None:
    """Refuse a device that torch does not see."""
    import torch

    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise typer.BadParameter(f"--device must be cpu, cuda or cuda:N, got {device}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"device {device} is not there: torch {torch.__version__} sees no CUDA device")

"""Decides, once, where Triton's kernels serve: on devices for which no compiled library of ours is loaded."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lesa_kernels import ops
from lesa_kernels.backends.libraries import Library, in_a_line

# Device -> the library that goes before Triton. The CUDA key is ROCm's too.
DEVICES: dict[str, str | None] = {"CUDA": "_cuda", "XPU": None}
TRITON_KERNELS = "lesa_kernels.backends.triton"


@dataclass(frozen=True)
class Choice:
    """Whether Triton serves one kind of device.

    Args:
        device: str, "CUDA" or "XPU".
        present: bool, whether torch was built for it.
        registered: bool, whether Triton's kernels are in the dispatcher.
        reason: str, why they are or are not.
    """

    device: str
    present: bool
    registered: bool
    reason: str


_choices: dict[str, Choice] = {}
_library = torch.library.Library("lesa", "IMPL")


def is_present(device: str) -> bool:
    """Return whether torch was built for a kind of device."""
    return torch.backends.cuda.is_built() if device == "CUDA" else getattr(torch.version, "xpu", None) is not None


def decide(device: str, present: bool, library: Library | None, triton: bool) -> Choice:
    """Say whether Triton serves a kind of device.

    Args:
        device: str, "CUDA" or "XPU".
        present: bool, whether torch was built for it.
        library: the compiled library for it, or None where there is none.
        triton: bool, whether triton can be imported.

    Returns:
        The choice, as yet without effect.
    """
    if library is not None and library.loaded:
        return Choice(device, present, False, f"{library.name} is loaded")
    if not present:
        return Choice(device, present, False, f"torch {torch.__version__} has no {device}")
    if not triton:
        return Choice(device, present, False, "triton is not installed")
    missing = f"{library.name}: {library.reason}" if library is not None else f"no compiled library serves {device}"
    return Choice(device, present, True, missing)


def _kernel(op: str) -> Callable[..., Any]:
    """Return a function that imports Triton's launcher of an op and calls it."""

    def call(*arguments: Any) -> Any:
        # Triton takes a second to import: not before a kernel is needed.
        return getattr(importlib.import_module(TRITON_KERNELS), op)(*arguments)

    return call


def register(device: str) -> None:
    """Put Triton's kernels into torch's dispatcher for a kind of device."""
    for name, op in ops.OPS.items():
        _library.impl(name, op.checked(_kernel(name)), device)


def _has_triton() -> bool:
    """Return whether there is a package of that name; only a call of its kernels shows whether it works."""
    try:
        spec = importlib.util.find_spec("triton")
        return spec is not None and spec.origin is not None  # a mere folder of that name has none
    except ValueError:  # something without a spec was put into sys.modules by hand
        return False


def why_triton_fails() -> str | None:
    """Return why our Triton kernels cannot be imported; None where they can."""
    try:
        importlib.import_module(TRITON_KERNELS)
    except Exception as error:  # whatever a broken package raises
        return in_a_line(error)
    return None


def load(libraries: tuple[Library, ...]) -> None:
    """Decide for every kind of device, once, and register where Triton serves."""
    named = {library.name: library for library in libraries}
    triton = _has_triton()
    for device, name in DEVICES.items():
        if device not in _choices:
            choice = decide(device, is_present(device), named[name] if name else None, triton)
            if choice.registered:
                register(device)
            _choices[device] = choice


def choices() -> dict[str, Choice]:
    """Return what `load` decided, by device."""
    return dict(_choices)

"""Where Triton serves, what `status()` says of it, and that registered launchers are ops like all others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_inputs import valid_arguments
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lesa_kernels import ops
from lesa_kernels.backends import libraries, registration, status_report
from lesa_kernels.backends.libraries import Library
from lesa_kernels.backends.registration import Choice, decide

MISSING = Library("_cuda", False, "not built: nvcc was not found at build time")
LOADED = Library("_cuda", True, "loaded", {"architectures": ["90"]})


@pytest.mark.parametrize(
    ("device", "present", "library", "triton", "registered", "reason"),
    [
        ("CUDA", True, MISSING, True, True, "_cuda: not built: nvcc was not found at build time"),
        ("CUDA", True, LOADED, True, False, "_cuda is loaded"),
        ("CUDA", False, MISSING, True, False, f"torch {torch.__version__} has no CUDA"),
        ("CUDA", True, MISSING, False, False, "triton is not installed"),
        ("XPU", True, None, True, True, "no compiled library serves XPU"),
        ("XPU", False, None, True, False, f"torch {torch.__version__} has no XPU"),
    ],
)
def test_triton_serves_where_no_library_does(
    device: str, present: bool, library: Library | None, triton: bool, registered: bool, reason: str
) -> None:
    assert decide(device, present, library, triton) == Choice(device, present, registered, reason)


@pytest.mark.parametrize("device", registration.DEVICES)
def test_a_decision_is_carried_out_once(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    registered: list[str] = []
    monkeypatch.setattr(registration, "_choices", {})
    monkeypatch.setattr(registration, "is_present", lambda name: name == device)
    monkeypatch.setattr(registration, "register", registered.append)
    for _ in range(2):
        registration.load((MISSING,))
    assert registered == [device]
    assert [name for name, choice in registration.choices().items() if choice.registered] == [device]


def _status_with(
    monkeypatch: pytest.MonkeyPatch, choice: Choice, library: Library, has_kernels: bool
) -> status_report.Status:
    known = torch._C._dispatch_has_kernel_for_dispatch_key
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda op, key: has_kernels if key == choice.device else known(op, key),
    )
    monkeypatch.setattr(status_report, "choices", lambda: {choice.device: choice})
    found = tuple(library if entry.name == library.name else entry for entry in libraries.libraries())
    monkeypatch.setattr(status_report, "libraries", lambda: found)
    return status_report.status()


def test_status_names_triton_and_why_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    status = _status_with(monkeypatch, decide("CUDA", True, MISSING, True), MISSING, True)
    served = [(kernel.kernel, kernel.reason) for kernel in status.kernels if kernel.device == "CUDA"]
    assert served == [("Triton", "_cuda: not built: nvcc was not found at build time")] * len(ops.OPS)
    assert "Triton" in str(status)


def test_status_names_a_triton_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    status = _status_with(monkeypatch, decide("CUDA", True, MISSING, False), MISSING, False)
    served = {(kernel.kernel, kernel.reason) for kernel in status.kernels if kernel.device == "CUDA"}
    reason = "_cuda: not built: nvcc was not found at build time; Triton: triton is not installed"
    assert served == {(status_report.REFERENCE, reason)}


def test_status_has_a_column_for_xpu_where_torch_does(monkeypatch: pytest.MonkeyPatch) -> None:
    status = _status_with(monkeypatch, decide("XPU", True, None, True), MISSING, True)
    assert {kernel.kernel for kernel in status.kernels if kernel.device == "XPU"} == {"Triton"}
    header = next(line for line in str(status).splitlines() if line.startswith("op "))
    assert header.split() == ["op", "CPU", "CUDA", "XPU"]


def _run(program: str, **environment: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", program]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_registering_fills_the_dispatcher_and_imports_no_triton() -> None:
    _run(
        """
import sys
import lesa_kernels
import torch
from lesa_kernels.backends import registration
assert "lesa_kernels.backends.triton" not in sys.modules
has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
for device in {device for device, choice in registration.choices().items() if not choice.present}:
    assert not any(has_kernel(f"lesa::{op}", device) for op in lesa_kernels.ops.OPS)
    registration.register(device)
    assert all(has_kernel(f"lesa::{op}", device) for op in lesa_kernels.ops.OPS)
assert "lesa_kernels.backends.triton" not in sys.modules
"""
    )


def test_what_is_registered_checks_before_it_calls_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Callable[..., Any]] = {}
    monkeypatch.setattr(
        registration, "_library", SimpleNamespace(impl=lambda op, call, device: found.update({op: call}))
    )
    monkeypatch.setattr(registration, "_kernel", lambda op: lambda *_: pytest.fail("a launcher is called"))
    registration.register("CUDA")
    assert list(found) == list(ops.OPS)
    for op, arguments in tree_map_only(Tensor, Tensor.long, valid_arguments(torch.float32, grad=False)).items():
        with pytest.raises(RuntimeError, match=f"^lesa::{op}: .* must have a dtype of float32, .* got int64$"):
            found[op](*arguments)


def test_registered_launchers_pass_opcheck() -> None:
    """On the CPU's key and interpreted, in a process of its own: the dispatcher then calls it as it would on CUDA."""
    _run(
        """
import sys
import lesa_kernels
import torch
from op_inputs import valid_arguments
from lesa_kernels.backends import registration
from triton_engines import mend_interpreter
mend_interpreter()
registration.register("CPU")
arguments = valid_arguments(torch.float32, grad=True)
for op in lesa_kernels.ops.OPS:
    torch.library.opcheck(getattr(torch.ops.lesa, op), arguments[op])
assert "lesa_kernels.backends.triton" in sys.modules
""",
        TRITON_INTERPRET="1",
        PYTHONPATH=os.pathsep.join(sys.path),
    )

"""`lesa.status()` tells the truth of torch's dispatcher, and a library that does not load is never silent."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lesa_kernels as lesa
from lesa_kernels import ops
from lesa_kernels.backends import libraries, registration, status_report


def test_one_entry_for_each_op_and_device() -> None:
    entries = [(kernel.op, kernel.device) for kernel in lesa.status().kernels]
    assert entries == [(op, device) for op in ops.OPS for device in ("CPU", "CUDA")]


def test_entries_agree_with_the_dispatcher() -> None:
    for kernel in lesa.status().kernels:
        compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"lesa::{kernel.op}", kernel.device)
        assert (kernel.kernel != status_report.REFERENCE) == compiled
        assert kernel.reason


def test_status_prints_a_table() -> None:
    status = lesa.status()
    text = str(status)
    assert f"torch {torch.__version__}" in text
    for op in ops.OPS:
        assert any(line.startswith(f"{op} ") for line in text.splitlines())
    for library in status.libraries:
        assert library.name in text
        assert library.reason in text


def test_missing_library_gives_the_build_s_reason(tmp_path: Path) -> None:
    record = {"skipped": {"cuda": "nvcc was not found at build time"}}
    (tmp_path / "_build_info.json").write_text(json.dumps(record))
    library = libraries.load_library("_cuda", tmp_path)
    assert not library.loaded
    assert library.reason == "not built: nvcc was not found at build time"
    assert "its file is gone" in libraries.load_library("_cpu", tmp_path).reason


def test_a_copy_that_was_never_installed_says_so(tmp_path: Path) -> None:
    assert "run `pip install -e .`" in libraries.load_library("_cpu", tmp_path).reason


def test_cuda_library_waits_for_a_torch_with_cuda(tmp_path: Path) -> None:
    (tmp_path / "_cuda.so").write_bytes(b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library = libraries.load_library("_cuda", tmp_path, cuda=None)
    assert library.reason == f"built, not loaded: torch {torch.__version__} has no CUDA"


@pytest.mark.parametrize(("name", "cuda"), [("_cpu", None), ("_cuda", "13.0")])
def test_a_library_that_fails_to_load_is_loud(tmp_path: Path, name: str, cuda: str | None) -> None:
    (tmp_path / f"{name}.so").write_bytes(b"no library")
    with pytest.warns(RuntimeWarning, match=rf"{name}\.so failed to load: .*status\(\) shows what serves instead"):
        library = libraries.load_library(name, tmp_path, cuda=cuda)
    assert not library.loaded
    assert library.reason.startswith("failed to load: ")


def _cuda_library(**facts: object) -> libraries.Library:
    return libraries.Library("_cuda", True, "loaded", {"cuda": "13.0", "architectures": ["80", "90"], **facts})


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that there is a GPU of a capability, a driver and a torch for a CUDA version."""

    def pretend(capability: tuple[int, int] | None = (9, 0), driver: int = 13000, torch_cuda: str = "13.0") -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)

    return pretend


WITHOUT_CUDA = "install again with LESA_BUILD=cpu: then Triton serves, or the reference where Triton cannot"


@pytest.mark.parametrize(
    ("capability", "held", "needed"),
    [
        ((7, 5), "80", WITHOUT_CUDA),
        ((8, 6), "90", "set CUDAARCHS=86 and install again"),
        ((8, 0), "80", None),
        ((12, 0), "80", None),
    ],
)
def test_a_gpu_too_old_for_the_kernels_is_noted(
    machine: Callable[..., None], capability: tuple[int, int], held: str, needed: str | None
) -> None:
    machine(capability)
    sm = f"sm_{capability[0]}{capability[1]}"
    expected = [f"cuda:0 (a GPU) is {sm}, the kernels start at sm_{held}: {needed}"] if needed else []
    assert status_report._cuda_notes(_cuda_library(architectures=["100", held])) == expected


@pytest.mark.parametrize(
    ("built", "driver", "torch_cuda", "said"),
    [
        ("13.0", 12080, "12.8", "the driver runs CUDA 12.8 at most"),
        ("13.0", 12080, "13.0", "the driver runs CUDA 12.8 at most"),
        ("13.0", 0, "12.6", "torch is for CUDA 12"),
        ("13.1", 13000, "12.8", None),
        ("12.0", 12000, "12.8", None),
        ("12.9", 13000, "13.0", None),
        ("13.0", 0, "13.0", None),
    ],
)
def test_a_driver_too_old_for_the_kernels_is_noted(
    machine: Callable[..., None], built: str, driver: int, torch_cuda: str, said: str | None
) -> None:
    machine(None if driver == 0 else (9, 0), driver, torch_cuda)
    notes = status_report._cuda_notes(_cuda_library(cuda=built))
    if said is None:
        assert notes == []
    else:
        (note,) = notes
        assert note.startswith(f"_cuda was compiled by nvcc {built} and needs a driver for CUDA 13 (")
        assert said in note
        assert "set CUDACXX to an nvcc of CUDA 12 and install again" in note
        assert note.endswith(WITHOUT_CUDA)


def test_a_gpu_that_cannot_be_asked_is_noted(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    machine()

    def fail(index: int) -> None:
        raise RuntimeError("Cannot re-initialize CUDA\nin forked subprocess")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fail)
    unknown = "whether _cuda fits the driver and the GPUs is unknown: "
    assert status_report._cuda_notes(_cuda_library()) == [
        f"{unknown}RuntimeError: Cannot re-initialize CUDA in forked subprocess"
    ]
    assert status_report._cuda_notes(_cuda_library(architectures=None))[0].startswith(unknown)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"skipped": []}', b'{"skipped": {}, "notes": "a note"}', b"\xff", None]
)
def test_a_damaged_record_says_so(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "_build_info.json"
    path.mkdir() if content is None else path.write_bytes(content)
    library = libraries.load_library("_cpu", tmp_path)
    assert not library.loaded
    assert library.reason.startswith("its file is not there, and the build's record _build_info.json is damaged (")
    assert library.reason.endswith("): install the package again")


def test_a_loaded_library_without_facts_is_still_loaded(tmp_path: Path) -> None:
    library = libraries._with_facts(libraries.Library("_cpu", True, "loaded"), tmp_path / "_cpu.so")
    assert library.loaded and not library.facts
    assert library.reason.startswith("loaded, but its facts cannot be read (OSError: ")
    assert status_report._label(library) == "C++ (which one is unknown)"
    nothing = libraries._with_facts(libraries.Library("libc", True, "loaded"), Path("libc.so.6"))
    assert "AttributeError" in nothing.reason
    assert status_report._cuda_notes(libraries.Library("_cuda", True, nothing.reason)) == []


@pytest.mark.parametrize("error", [UnicodeDecodeError("utf-8", b"", 0, 1, "no text"), TypeError("no text"), None])
def test_damaged_metadata_are_no_error(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> None:
    def version(name: str) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert lesa.status().versions["lesa-kernels"].startswith("(unknown: ")


def test_a_damaged_installation_is_reported(tmp_path: Path) -> None:
    """Everything beside the Python files is damaged, and so is triton: the import warns, `status()` tells all of it."""
    source = Path(lesa.__file__).parent
    unwanted = shutil.ignore_patterns("*.so", "*.json", "*.safetensors", "__pycache__")
    package = shutil.copytree(source, tmp_path / "lesa_kernels", ignore=unwanted)
    for name in ("_cpu.so", f"_inspect{sysconfig.get_config_var('EXT_SUFFIX')}", "_build_info.json"):
        (package / name).write_bytes(b"damaged")
    (tmp_path / "triton.py").write_text("raise ImportError('no backend')\n")
    code = (
        "import torch; torch.backends.cuda.is_built = lambda: True;"
        "import lesa_kernels as lesa; print(lesa.__file__); print(lesa.status())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == str(package / "__init__.py")
    assert any(line.startswith("_cpu      failed to load: ") for line in lines)
    assert any(line.startswith("_inspect  failed to load: OSError: ") for line in lines)
    assert any(line.startswith("note: the build's record _build_info.json is damaged (") for line in lines)
    broken = "note: every op fails on CUDA: Triton cannot be imported (ImportError: no backend): repair or remove it"
    assert broken in lines
    assert "RuntimeWarning: lesa_kernels: _cpu.so failed to load" in done.stderr


def test_a_triton_without_a_spec_is_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", ModuleType("triton"))
    assert not registration._has_triton()


def test_inspection_module_of_another_python(tmp_path: Path) -> None:
    other = f"cpython-3{sys.version_info.minor + 1}"
    (tmp_path / f"_inspect.{other}-x86_64-linux-gnu.so").write_bytes(b"")
    module, reason = libraries.inspection_module(tmp_path)
    assert module is None
    assert reason.startswith(f"built for {other}-x86_64-linux-gnu, this is cpython-3{sys.version_info.minor}")

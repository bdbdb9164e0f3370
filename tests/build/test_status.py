"""`lesa.status()` tells the truth of torch's dispatcher, and a library that does not load is never silent."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import pytest
import torch

import lesa_kernels as lesa
from lesa_kernels import ops
from lesa_kernels.backends import libraries, report


def test_one_entry_for_each_op_and_device() -> None:
    entries = [(kernel.op, kernel.device) for kernel in lesa.status().kernels]
    assert entries == [(op, device) for op in ops.OPS for device in ("CPU", "CUDA")]


def test_entries_agree_with_the_dispatcher() -> None:
    for kernel in lesa.status().kernels:
        compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"lesa::{kernel.op}", kernel.device)
        assert (kernel.kernel != report.REFERENCE) == compiled
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
    with pytest.warns(RuntimeWarning, match=rf"{name}\.so failed to load: .*status\(\) tells what serves instead"):
        library = libraries.load_library(name, tmp_path, cuda=cuda)
    assert not library.loaded
    assert library.reason.startswith("failed to load: ")


@pytest.mark.parametrize(("capability", "noted"), [((7, 5), True), ((8, 0), False), ((12, 0), False)])
def test_a_gpu_too_old_for_the_kernels_is_noted(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], noted: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "a GPU")
    library = libraries.Library("_cuda", True, "loaded", {"architectures": ["80", "90"]})
    expected = ["cuda:0 (a GPU) is sm_75, the kernels start at sm_80: set CUDAARCHS=75 and install again"]
    assert report._old_gpus(library) == (expected if noted else [])


def test_inspection_module_of_another_python(tmp_path: Path) -> None:
    other = f"cpython-3{sys.version_info.minor + 1}"
    (tmp_path / f"_inspect.{other}-x86_64-linux-gnu.so").write_bytes(b"")
    module, reason = libraries.inspection_module(tmp_path)
    assert module is None
    assert reason.startswith(f"built for {other}-x86_64-linux-gnu, this is cpython-3{sys.version_info.minor}")

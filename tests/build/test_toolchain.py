"""What a build decides: which libraries, for which reasons, and which requests it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def toolchain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "build_backend"))
    for name in (
        "LESA_BUILD",
        "CUDAARCHS",
        "TORCH_CUDA_ARCH_LIST",
        "MAX_JOBS",
        "CXX",
        "CUDACXX",
        "CUDA_HOME",
        "CUDA_PATH",
    ):
        monkeypatch.delenv(name, raising=False)
    import lesa_toolchain

    return lesa_toolchain


@pytest.fixture
def bare_machine(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A machine with cmake and ninja, but without any compiler."""
    monkeypatch.setattr(toolchain, "find_cmake", lambda: ("cmake", "ninja"))
    monkeypatch.setattr(toolchain.shutil, "which", lambda name, path=None: None)
    return toolchain


def test_torch_is_found_without_importing_it(toolchain: ModuleType) -> None:
    found = toolchain.find_torch()
    assert found.version == torch.__version__
    assert (found.root / "include" / "torch" / "csrc" / "stable").is_dir()


def test_isolation_does_not_hide_torch(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    assert toolchain.find_torch().version == torch.__version__


def test_no_torch_is_one_sentence(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "_TORCH_ROOT", "print()")
    with pytest.raises(SystemExit, match=r"^lesa-kernels: PyTorch was not found .*pip install torch"):
        toolchain.find_torch()


@pytest.mark.parametrize(("version", "fits"), [("2.10.1", False), ("2.11.0+cu130", True), ("3.0.0a0", True)])
def test_old_torch_is_refused(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, version: str, fits: bool
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '{version}'\n")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(toolchain, "_TORCH_ROOT", f"print({str(tmp_path)!r})")
    if fits:
        assert toolchain.find_torch().version == version
    else:
        with pytest.raises(SystemExit, match=r"2\.11 or newer is required, 2\.10\.1 is installed"):
            toolchain.find_torch()


def test_no_compiler_gives_the_pure_package(bare_machine: ModuleType) -> None:
    plan = bare_machine.make_plan()
    assert plan.targets == []
    assert plan.skipped["cpu"] == "no C++ compiler was found at build time"
    assert set(plan.skipped) == {"cpu", "cuda", "inspect"}


@pytest.mark.parametrize("request_", ["cpu", "cuda", "cpu,cuda"])
def test_a_request_that_cannot_be_met_is_an_error(
    bare_machine: ModuleType, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    monkeypatch.setenv("LESA_BUILD", request_)
    with pytest.raises(SystemExit, match=f"LESA_BUILD={request_} asks for .*no C\\+\\+ compiler was found"):
        bare_machine.make_plan()


def test_an_unknown_request_is_an_error(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LESA_BUILD", "cpu,rocm")
    with pytest.raises(SystemExit, match="LESA_BUILD must be"):
        toolchain.make_plan()


def test_none_builds_nothing_and_needs_no_torch(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LESA_BUILD", "none")
    monkeypatch.setattr(toolchain, "find_torch", lambda: pytest.fail("looked for torch"))
    plan = toolchain.make_plan()
    assert plan.targets == []
    assert plan.skipped["cpu"] == "LESA_BUILD=none at build time"
    assert not toolchain.needs_torch()


def test_missing_nvcc_leaves_out_cuda_alone(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.setattr(toolchain, "find_compiler", lambda: "c++")
    monkeypatch.setattr(toolchain, "find_pybind11", lambda: Path("pybind11"))
    monkeypatch.setattr(toolchain, "find_cmake", lambda: ("cmake", "ninja"))
    monkeypatch.setattr(
        toolchain.shutil, "which", lambda name, path=None: None if "nvcc" in name else which(name, path=path)
    )
    plan = toolchain.make_plan()
    assert plan.targets == ["cpu", "inspect"]
    assert plan.skipped == {"cuda": "nvcc (the CUDA toolkit's compiler) was not found at build time"}


def test_architectures(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = "80-real;90-real;100-real;120-real;120-virtual"
    assert toolchain.choose_architectures((75, 80, 86, 90, 100, 103, 120, 121)) == (everything, [])
    assert toolchain.choose_architectures((75, 80, 90)) == (
        "80-real;90-real;90-virtual",
        ["nvcc does not know sm_100: left out", "nvcc does not know sm_120: left out"],
    )
    with pytest.raises(toolchain.Missing, match="nvcc compiles for none of sm_80, sm_90, sm_100, sm_120"):
        toolchain.choose_architectures((50, 75))


@pytest.mark.parametrize("asked", ["89", "80-real;90a-virtual", "native"])
def test_cudaarchs_is_taken_as_it_is(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv("CUDAARCHS", asked)
    assert toolchain.choose_architectures((75, 80, 89, 90)) == (asked, [])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "no such thing")
    wins = ["TORCH_CUDA_ARCH_LIST is set as well as CUDAARCHS: CUDAARCHS wins"]
    assert toolchain.choose_architectures((75, 80, 89, 90)) == (asked, wins)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("75", r"CUDAARCHS=`75` asks for sm_75, but the kernels need sm_80 or newer: leave it out\. .* LESA_BUILD=cpu"),
        ("90;70-virtual", "CUDAARCHS=`90;70-virtual` asks for sm_70"),
        ("120", "CUDAARCHS=`120` asks for sm_120, but nvcc knows 75, 80, 90 only"),
        ("all", "CUDAARCHS must be `native` or architectures from 80 on as in `80;90-real`, got `all` in `all`"),
        ("80,90", "got `80,90` in `80,90`"),
        ("90;", "got `` in `90;`"),
    ],
)
def test_cudaarchs_that_cannot_be_compiled_is_refused(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str, said: str
) -> None:
    monkeypatch.setenv("CUDAARCHS", asked)
    with pytest.raises(toolchain.BuildError, match=said):
        toolchain.choose_architectures((75, 80, 90))


@pytest.mark.parametrize(
    ("asked", "chosen", "left_out"),
    [
        ("8.0;9.0+PTX", "80-real;90-real;90-virtual", []),
        ("8.0 9.0", "80-real;90-real", []),
        ("Hopper", "90-real;90-virtual", []),
        ("Ampere;9.0a;8.0", "80-real;86-real;86-virtual;90a-real", []),
        ("7.0 7.5 8.0 12.0+PTX;", "80-real;120-real;120-virtual", ["kernels need sm_80: sm_70", "sm_75"]),
        ("Blackwell", "100-real;120-real", ["nvcc does not know sm_103", "nvcc does not know sm_121"]),
        ("native", "native", []),
    ],
)
def test_torch_s_list_of_architectures_is_honoured(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str, chosen: str, left_out: list[str]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    found, notes = toolchain.choose_architectures((75, 80, 86, 90, 100, 120))
    assert found == chosen
    assert len(notes) == len(left_out)
    for note, said in zip(notes, left_out, strict=True):
        assert note.startswith("TORCH_CUDA_ARCH_LIST: ") and said in note and note.endswith("left out")


@pytest.mark.parametrize("asked", ["sm_90", "9", "90", "Hoper", "8.0,9.0"])
def test_an_unknown_word_in_torch_s_list_is_refused(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(toolchain.BuildError, match=rf"got `{asked}` in `{asked}`: mend it, or set CUDAARCHS"):
        toolchain.choose_architectures((80, 90))


@pytest.mark.parametrize("asked", ["7.5+PTX", "12.0", " "])
def test_torch_s_list_without_a_usable_architecture_leaves_out_cuda(
    toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(toolchain.Missing, match="holds nothing that nvcc and the kernels know"):
        toolchain.choose_architectures((75, 80, 90))


def test_max_jobs(toolchain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert toolchain.max_jobs() == len(os.sched_getaffinity(0))
    monkeypatch.setenv("MAX_JOBS", "3")
    assert toolchain.max_jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="MAX_JOBS must be a positive number, got `many`"):
        toolchain.max_jobs()


def test_the_record_says_what_was_left_out(bare_machine: ModuleType, tmp_path: Path) -> None:
    bare_machine.save_record(bare_machine.make_plan(), tmp_path / "_build_info.json")
    record = json.loads((tmp_path / "_build_info.json").read_text())
    assert record["built"] == []
    assert record["torch"] == torch.__version__
    assert record["skipped"]["cuda"] == "no C++ compiler was found at build time"


def test_the_backend_stops_before_anything_is_downloaded(tmp_path: Path) -> None:
    """The hook that pip calls first, in a Python that has setuptools but no torch."""
    call = "import lesa_backend; lesa_backend.get_requires_for_build_editable()"
    isolated = (
        "import sys, importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest);"
        f"import lesa_toolchain; lesa_toolchain._TORCH_ROOT = 'print()'; {call}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "build_backend")}
    done = subprocess.run(
        [sys.executable, "-c", isolated], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("lesa-kernels: PyTorch was not found")
    assert done.stderr.count("\n") == 1

"""`make compatibility`: the command runs with each torch that can be had, and the others are named."""

from __future__ import annotations

import os
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from tools import compatibility

OWN = torch.__version__.partition("+")[0]
# Stands in for the tests: tells which torch it would have got.
WHICH = [
    sys.executable,
    "-c",
    "import importlib.util, sys; sys.exit('elsewhere' in importlib.util.find_spec('torch').origin)",
]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pip that knows the wheels of the test alone, and nothing of this machine's configuration."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(compatibility, "FOLDER", tmp_path / "elsewhere")


def offer(folder: Path, version: str) -> None:
    """Put a wheel where pip looks for it."""
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr("torch/__init__.py", "")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_it_runs_with_what_can_be_had_and_names_the_rest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    offer(tmp_path, "0.1.0+cpu")
    assert compatibility.main(WHICH, ("0.1.0", "0.2.0", OWN)) == 1
    said = capfd.readouterr().out
    # The command fails where it finds the torch that was fetched, and so tells that it did.
    assert "torch 0.1.0: FAILED, exit status 1" in said
    assert "torch 0.2.0: not run: pip finds no CPU build" in said
    assert f"torch {OWN}: in this environment" in said
    # What was fetched once stays.
    (tmp_path / "torch-0.1.0+cpu-py3-none-any.whl").unlink()
    assert compatibility.fetch("0.1.0") == tmp_path / "elsewhere" / "0.1.0"


def test_builds_for_gpus_are_not_fetched(tmp_path: Path) -> None:
    offer(tmp_path, "0.1.0")
    offer(tmp_path, "0.1.0+cu130")
    with pytest.raises(compatibility.NotOfferedError, match=r"no CPU build of it for this Python$"):
        compatibility.fetch("0.1.0")


def test_a_constraint_that_leaves_no_build_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    offer(tmp_path, "0.1.0+cpu")
    (tmp_path / "constraints.txt").write_text("torch<0.1\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))
    assert compatibility.main(WHICH, ("0.1.0",)) == 0
    assert "torch 0.1.0: not run: pip finds no CPU build of it for this Python under its constraint torch<0.1\n" in (
        capfd.readouterr().out
    )


def test_a_fault_of_the_download_is_told(tmp_path: Path) -> None:
    (tmp_path / "torch-0.1.0+cpu-py3-none-any.whl").write_text("no archive")
    with pytest.raises(SystemExit, match=r"torch 0\.1\.0\+cpu could not be fetched"):
        compatibility.fetch("0.1.0")
    assert not (tmp_path / "elsewhere" / "0.1.0").exists()

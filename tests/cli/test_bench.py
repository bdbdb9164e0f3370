"""`lesa bench` runs the benchmarks of the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lesa_kernels.cli import app
from lesa_kernels.cli.bench import ROOT


def test_its_options_are_those_of_the_benchmarks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lesa_kernels.cli", "bench", "--op", "nothing"]
    result = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2 and "must name an op of the benchmark" in result.stderr


def test_without_a_checkout_it_says_where_to_find_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules["lesa_kernels.cli.bench"], "ROOT", tmp_path)
    result = CliRunner().invoke(app, ["bench"])
    assert result.exit_code == 2 and "clone it and run `make bench`" in result.output

"""`lesa status` prints which kernels serve this machine."""

from __future__ import annotations

from typer.testing import CliRunner

import lesa_kernels as lesa
from lesa_kernels.cli import app


def test_it_names_each_op_with_the_kernels_that_serve_it() -> None:
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 0, result.output
    status = lesa.status()
    lines = result.output.splitlines()
    assert status.kernels and status.libraries
    for each in status.kernels:
        assert any(line.startswith(f"{each.op} ") and each.kernel in line for line in lines), each
    for library in status.libraries:
        assert f"{library.name} " in result.output and library.reason in result.output
    assert lines[0].split()[0] in status.versions


def test_it_takes_no_arguments() -> None:
    assert CliRunner().invoke(app, ["status", "cpu"]).exit_code == 2

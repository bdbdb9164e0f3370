"""`make sanitize`: each sanitizer finds what was planted, and it is noticed when one does not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tools.sanitize import __main__ as sanitize

pytestmark = pytest.mark.skipif(
    not shutil.which("setarch") or not shutil.which(sanitize.CXX), reason="needs setarch and a C++ compiler"
)


@pytest.mark.parametrize("name", sanitize.SANITIZERS)
def test_planted_faults_are_found(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sanitizer = sanitize.SANITIZERS[name]
    sanitize.find_planted(sanitizer, tmp_path, sanitize.environment(sanitizer, tmp_path))
    said = capsys.readouterr().out
    assert all(fault in said for fault in sanitizer.faults)
    assert not list(tmp_path.glob(f"{sanitize.REPORT}.*"))


def test_a_sanitizer_that_finds_nothing_is_noticed(tmp_path: Path) -> None:
    blind = replace(sanitize.SANITIZERS["address"], flags=())
    with pytest.raises(SystemExit, match="past_the_end should be found"):
        sanitize.find_planted(blind, tmp_path, sanitize.environment(blind, tmp_path))

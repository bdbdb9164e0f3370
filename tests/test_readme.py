"""The Python blocks of the documents run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?```python\n(.*?)```", re.DOTALL)


def _blocks() -> list[pytest.param]:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = []
    for document in documents:
        for number, (reason, code) in enumerate(BLOCK.findall(document.read_text())):
            if not reason:
                found.append(pytest.param(code, id=f"{document.name}-{number}"))
    return found


@pytest.mark.parametrize("code", _blocks())
def test_block_runs(code: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr

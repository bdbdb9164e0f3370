"""The Python blocks of the documents run as they stand; `pipe` is a tiny FLUX where they say so."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:<!-- (not run|run): .+? -->\n)?```python\n(.*?)```", re.DOTALL)
GIVEN_A_PIPELINE = "import torch; import lesa_kernels as lesa; from small_flux import pipe\n"


def _blocks() -> list[pytest.param]:
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = []
    for document in documents:
        for number, (how, code) in enumerate(BLOCK.findall(document.read_text())):
            if how != "not run":
                given = GIVEN_A_PIPELINE if how == "run" else ""
                found.append(pytest.param(given + code, id=f"{document.name}-{number}"))
    return found


@pytest.mark.parametrize("code", _blocks())
def test_block_runs(code: str, tmp_path: Path) -> None:
    if GIVEN_A_PIPELINE in code:
        pytest.importorskip("diffusers", reason="diffusers is not installed (extra: diffusers)")
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr

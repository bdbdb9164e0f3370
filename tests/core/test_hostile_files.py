"""Files that mean harm: they are refused in a sentence, no code of theirs runs, and neither memory nor time is lost."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile_files
import pytest


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What a process says that opens every file."""
    folder = tmp_path_factory.mktemp("hostile")
    command = [sys.executable, "-W", "ignore", hostile_files.__file__, str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert not (folder / hostile_files.MARKER).exists(), "code ran"
    return [json.loads(line) for line in process.stdout.splitlines()]


def test_all_are_refused_and_named(told: list[dict[str, Any]]) -> None:
    assert len(told) > 90
    for file in told:
        kind, _, text = file["said"].partition(": ")
        assert kind in ("ValueError", "FileNotFoundError"), file
        assert file["path"] in text and len(text) < 800, file


def test_none_takes_long(told: list[dict[str, Any]]) -> None:
    assert max(file["seconds"] for file in told) < 10


def test_the_pickles_are_not_harmless(tmp_path: Path) -> None:
    marker = tmp_path / hostile_files.MARKER
    for calls in hostile_files.harm(marker).values():
        pickle.loads(pickle.dumps(calls))
        assert marker.exists()
        marker.unlink()

"""Writes each result of a check at once, as a line of JSON, so that a check that is stopped keeps what it has found."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASSED, FAILED, CUT, LEFT_OUT = "passed", "FAILED", "cut", "left out"
"""A check that ran out of time is cut: it has proven nothing, right or wrong."""

SUMMARY = "summary"
"""Name of the record that says how a phase ended."""
FACTS = "facts"
"""Phase of the record that describes the machine."""


@dataclass(frozen=True)
class Record:
    """One result.

    Args:
        phase: that it belongs to.
        name: of what was checked.
        status: PASSED, FAILED, CUT or LEFT_OUT.
        text: why, or what was found; of a failed process its last lines.
        seconds: that it took.
        values: figures, by name.
    """

    phase: str
    name: str
    status: str
    text: str = ""
    seconds: float = 0.0
    values: dict[str, Any] = field(default_factory=dict)


def append(record: Record, path: Path) -> None:
    """Append a record to a file; several processes may do so at the same time."""
    line = json.dumps(asdict(record)) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def load(path: Path) -> list[Record]:
    """Read all records of a file, none where there is no file; a line that was cut off in the middle is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            found.append(Record(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found


def worst(statuses: list[str]) -> str:
    """Return the status of a whole: FAILED before CUT before PASSED; LEFT_OUT where nothing else happened."""
    return next((status for status in (FAILED, CUT, PASSED) if status in statuses), LEFT_OUT)

"""Keeps results at once, as rows and as JSON lines, so that a run that is ended loses nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import results
from benchmarks.harness import Dropped
from benchmarks.results import Measurement


class Record:
    """What was measured and dropped so far.

    Args:
        console: shows it.
        table: a CSV file that rows are appended to, None for none.
        lines: a file that rows and dropped variants are appended to as JSON, one a line; None for none.
    """

    def __init__(self, console: Console, table: Path | None = None, lines: Path | None = None) -> None:
        self.rows: list[Measurement] = []
        self.dropped: list[Dropped] = []
        self.console, self._table, self._lines = console, table, lines

    def measured(self, rows: Sequence[Measurement]) -> None:
        """Keep the rows of a case."""
        if rows:
            self.console.print(results.table(rows))
        self.rows += rows
        if self._table is not None:
            results.save(rows, self._table)
        for row in rows:
            self.line(asdict(row))

    def drop(self, dropped: Dropped) -> None:
        """Keep why a variant or a case was not timed."""
        kind = "WRONG" if dropped.wrong else "dropped"
        name = dropped.variant or "all variants"
        self.console.print(f"{kind}: {dropped.op} at {dropped.size}, {name}: {dropped.dropped}", markup=False)
        self.dropped.append(dropped)
        self.line(asdict(dropped))

    def line(self, content: dict[str, Any]) -> None:
        """Append a JSON object to the lines."""
        if self._lines is not None:
            with self._lines.open("a", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")

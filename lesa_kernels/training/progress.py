"""Shows how far long work has come, and how long it has taken."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column


def progress_bar(show: bool = True) -> Progress:
    """Make a progress bar; a hidden one takes updates all the same."""
    # In a narrow terminal the description takes two lines, and the numbers stay whole.
    whole = Column(no_wrap=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", table_column=Column()),
        BarColumn(bar_width=20, table_column=whole),
        MofNCompleteColumn(table_column=whole),
        TimeElapsedColumn(table_column=whole),
        TimeRemainingColumn(table_column=whole),
        disable=not show,
    )


@contextmanager
def waiting(text: str, show: bool = True) -> Generator[None, None, None]:
    """Show a spinner and the elapsed time while something takes long of which no parts are known."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, disable=not show) as bar:
        task = bar.add_task(text, total=None)
        yield
        bar.update(task, total=1, completed=1)

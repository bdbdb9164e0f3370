"""Files that appear whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Give a path to write to in the same folder; once it is written and on the disk, it takes the file's place.

    Args:
        path: the file; one that is there stays until the new one is complete. Only one process may write it.
    """
    # A fixed name: what a killed process left is overwritten by the next one.
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        yield unfinished
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise

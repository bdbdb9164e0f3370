"""The folder of a training, which one process at a time may write to."""

from __future__ import annotations

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"


@contextmanager
def reserved(folder: Path) -> Generator[None, None, None]:
    """Make a folder if it is missing, and keep other processes out of it; the system lets go for one that dies.

    Raises:
        BlockingIOError: when another one, or another thread, writes there.
        OSError: when the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Opened for writing, so it shows too whether one may write there.
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        text = "another process writes to this folder; wait for it, stop it, or take another folder"
        raise BlockingIOError(errno.EAGAIN, text, str(folder)) from error
    try:
        yield
    finally:
        lock.release()

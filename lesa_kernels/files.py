"""Reads files that anyone may have written, within bounds, and writes files whole or not at all."""

from __future__ import annotations

import codecs
import errno
import fcntl
import json
import os
import re
import shutil
import stat
import time
import warnings
from collections.abc import Generator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

# What JSON makes of a file can be twenty times its size.
LARGEST_JSON = 4 << 20
_LARGEST_TEXT = 16 << 20
# What a text in another encoding than UTF-8 may begin with; UTF-32's little end begins as UTF-16's does.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
LARGEST_WEIGHTS = 4 << 30
"""Bytes of a predictor's or of a training's file: one with holes takes no room on a disk, and any in the memory."""
PATIENCE_SECONDS = 20.0
"""How long a writer, or a loader that finds a half-written pair of files, waits for another writer."""
PAUSE_SECONDS = 0.005
_LONGEST_REASON = 300
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def opened(file: Path, largest: int | None = None) -> Generator[BinaryIO, None, None]:
    """Open a file for reading, once: all that is read from the handle is of one file, whoever replaces it meanwhile.

    Args:
        file: its path.
        largest: bytes that it may have, None for any number.

    Raises:
        FileNotFoundError: when there is nothing.
        ValueError: when it is larger, or something else than a file: reading a device or a pipe may never end.
    """
    if not file.is_file():
        if file.exists():
            raise ValueError(f"{file}: must be a regular file")
        raise FileNotFoundError(f"{file}: no such file")
    with open(file, "rb", opener=_without_waiting) as handle:
        found = os.fstat(handle.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{file}: must be a regular file")
        if largest is not None and found.st_size > largest:
            raise ValueError(f"{file}: must have at most {largest} bytes, it has {found.st_size}")
        yield handle


def _without_waiting(path: str, flags: int) -> int:
    """Open a file; a pipe that nobody writes to is empty then, and not waited for."""
    return os.open(path, flags | os.O_NONBLOCK)


def shortened(reason: object) -> str:
    """Return the text of an error that may quote what a file holds, cut to what one can read."""
    text = str(reason)
    return text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ..."


def parsed(text: str | bytes, file: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: the object.
        file: where it comes from, for messages.

    Raises:
        ValueError: when it is none, or larger than any of ours.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"{file}: must be a JSON object of at most {LARGEST_JSON} bytes")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: must be a JSON object: {shortened(error)}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: must be a JSON object, got {type(found).__name__}")
    return found


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it holds none, or is larger than any of ours.
    """
    with opened(file) as handle:
        return parsed(handle.read(LARGEST_JSON + 1), file)


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text that somebody wrote; those without a character are left out.

    Lines end with a line feed, after a carriage return or not, and with nothing else. Byte order marks and the spaces
    around a line are no part of it.

    Args:
        file: the text, in UTF-8; a pipe is read until its writers close it.

    Raises:
        ValueError: when it is in another encoding, which is named, or too long.
        OSError: when it cannot be read.
    """
    with open(file, "rb", opener=_without_waiting) as handle:
        os.set_blocking(handle.fileno(), True)
        data = handle.read(_LARGEST_TEXT + 1)
    if len(data) > _LARGEST_TEXT:
        raise ValueError(f"{file}: must be a text of at most {_LARGEST_TEXT} bytes")
    if encoding := next((name for mark, name in _MARKS.items() if data.startswith(mark)), None):
        raise ValueError(f"{file}: must be a text in UTF-8, it is in {encoding}")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        what = f"line {line} is not: byte {data[error.start]:#04x}"
        raise ValueError(f"{file}: must be a text in UTF-8, {what}") from error
    if "\0" in text:
        raise ValueError(f"{file}: must be a text in UTF-8, it holds characters of zeros as UTF-16 without a mark does")
    lines = [line.lstrip("\ufeff").strip() for line in text.split("\n")]
    return [line for line in lines if line]


@contextmanager
def opened_tensors(file: Path, largest: int | None = None) -> Generator[Any, None, None]:
    """Open a safetensors file; its header is checked against its size, so no tensor is larger than the file.

    Args:
        file: its path.
        largest: bytes that it may have, None for any number.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, or too large.
    """
    with opened(file, largest) as handle, tensors_of(handle, file) as tensors:
        yield tensors


@contextmanager
def tensors_of(handle: BinaryIO, file: Path) -> Generator[Any, None, None]:
    """Read an open safetensors file; see `opened_tensors`.

    Args:
        handle: must stay open as long.
        file: where it comes from, for messages.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        # safe_open opens the path that it gets a second time for the tensors: this one leads to the same file.
        with safe_open(f"/dev/fd/{handle.fileno()}", framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: must be a whole safetensors file: {shortened(error)}") from error
    except MemoryError as error:
        raise ValueError(f"{file}: must fit into the memory") from error
    except RuntimeError as error:
        if "unable to mmap" not in str(error):
            raise
        raise ValueError(f"{file}: must fit into the memory") from error


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Give a path to write to; once it is written and on the disk, the file takes the place of the old one.

    Args:
        path: the file; one that is there stays until the new one is complete.

    Raises:
        BlockingIOError: when another writer does not come to its end.
        OSError: when it cannot be written; names it.
    """
    with replacing_all(path.parent, path.name) as unfinished:
        yield unfinished / path.name


@contextmanager
def replacing_all(folder: Path, name: str) -> Generator[Path, None, None]:
    """Give an empty folder to write to; once all its files are on the disk, they take their places one by one.

    Args:
        folder: where the files belong; those that are there stay until all new ones are complete.
        name: of what is written; writers of the same name take turns.

    Raises:
        BlockingIOError: when another writer does not come to its end.
        OSError: when it cannot be written; names it.
    """
    # A fixed name: what a killed process left is removed by the next one. A folder: safetensors writes to files of
    # random names beside the one that it is given.
    unfinished = folder / f".{name}.unfinished"
    try:
        with only_writer(folder, name):
            try:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir()
                yield unfinished
                files = sorted(unfinished.iterdir())
                for file in files:
                    _settle(file)
                for file in files:
                    os.replace(file, folder / file.name)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except BlockingIOError:
        raise
    except (OSError, SafetensorError) as error:
        text = f"cannot be written ({shortened(error)}); older files are kept"
        raise OSError(_number(error), text, str(folder / name)) from error


@contextmanager
def only_writer(folder: Path, name: str) -> Generator[None, None, None]:
    """Wait for other writers, in this process and in others, and keep them out until this one is done or dies.

    Args:
        folder: where it writes.
        name: of what it writes.

    Raises:
        BlockingIOError: when another one does not come to its end; names it.
        OSError: when the folder cannot be written to.
    """
    path = _lock_path(folder, name)
    latest = time.monotonic() + PATIENCE_SECONDS
    while (handle := _locked(path)) is None:
        if time.monotonic() > latest:
            text = f"{writer_of(folder, name) or 'another process'} has been writing it for {PATIENCE_SECONDS:.0f} s"
            raise BlockingIOError(errno.EAGAIN, f"{text}; wait for it, or stop it", str(folder / name))
        time.sleep(PAUSE_SECONDS)
    try:
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {os.uname().nodename}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        handle.close()


def writer_of(folder: Path, name: str) -> str | None:
    """Return who writes something, None where nobody does; see `only_writer`."""
    with suppress(FileNotFoundError, PermissionError), _lock_path(folder, name).open("rb", buffering=0) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return handle.read(_LONGEST_REASON).decode(errors="replace") or "another process"
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
    return None


def _lock_path(folder: Path, name: str) -> Path:
    """Return the file that a writer locks; it is there as long as somebody writes, or was killed while writing."""
    return folder / f".{name}.writer"


def _locked(path: Path) -> FileIO | None:
    """Open and lock a file; None where another one holds it, or has just removed it."""
    # A link that somebody left there would have its target overwritten.
    handle = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666), "r+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle.fileno()), path.stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            handle.close()
            raise
        text = f"{path.parent} is on a file system without locks: one process at a time may write there"
        warnings.warn(text, stacklevel=2)
        return handle
    handle.close()
    return None


def _number(error: OSError | SafetensorError) -> int:
    """Return the system's number of an error, which safetensors puts into its text."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else errno.EIO


def _settle(file: Path) -> None:
    """Bring a file to the disk, with the rights of the umask: safetensors lets only its owner read."""
    file.chmod(file.parent.stat().st_mode & 0o666)
    with file.open("rb") as written:
        os.fsync(written.fileno())

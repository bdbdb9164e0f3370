"""Reads files that anyone may have written, within bounds, and writes files whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

# What JSON makes of a file can be twenty times its size.
LARGEST_JSON = 4 << 20
_LONGEST_REASON = 300


def regular(file: Path) -> Path:
    """Return a path, if it is that of a file: reading a device or a pipe may never end.

    Raises:
        FileNotFoundError: when there is nothing.
        ValueError: when it is something else.
    """
    if file.is_file():
        return file
    if file.exists():
        raise ValueError(f"{file}: must be a regular file")
    raise FileNotFoundError(f"{file}: no such file")


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
    with regular(file).open("rb") as opened:
        return parsed(opened.read(LARGEST_JSON + 1), file)


@contextmanager
def opened_tensors(file: Path) -> Generator[Any, None, None]:
    """Open a safetensors file; its header is checked against its size, so no tensor is larger than the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged.
    """
    try:
        with safe_open(regular(file), framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{file}: must be a whole safetensors file: {shortened(error)}") from error


@contextmanager
def replacing(path: Path) -> Generator[Path, None, None]:
    """Give a path to write to; once it is written and on the disk, the file takes the place of the old one.

    Args:
        path: the file; one that is there stays until the new one is complete. Only one process may write it.

    Raises:
        OSError: when it cannot be written; names it.
    """
    with replacing_all(path.parent, path.name) as unfinished:
        yield unfinished / path.name


@contextmanager
def replacing_all(folder: Path, name: str) -> Generator[Path, None, None]:
    """Give an empty folder to write to; once all its files are on the disk, they take their places one by one.

    Args:
        folder: where the files belong; those that are there stay until all new ones are complete.
        name: of what is written. Only one process may write it.

    Raises:
        OSError: when it cannot be written; names it.
    """
    # A fixed name: what a killed process left is removed by the next one. A folder: safetensors writes to files of
    # random names beside the one that it is given.
    unfinished = folder / f".{name}.unfinished"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        files = sorted(unfinished.iterdir())
        for file in files:
            _settle(file)
        for file in files:
            os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        text = f"cannot be written ({shortened(error)}); older files are kept"
        raise OSError(_number(error), text, str(folder / name)) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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

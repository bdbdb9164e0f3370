"""Texts that users wrote: where their lines end, and encodings that are refused by name."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from lesa_kernels.files import read_lines


def lines(folder: Path, data: bytes) -> list[str]:
    (folder / "prompts.txt").write_bytes(data)
    return read_lines(folder / "prompts.txt")


def test_lines_end_with_line_feeds_only(tmp_path: Path) -> None:
    inside = "a\u2028b\u2029c\x85d\x0ce\x0bf\x1cg\rh"
    assert lines(tmp_path, f"{inside}\r\n\n  a cat \n \t\r\nlast".encode()) == [inside, "a cat", "last"]
    assert lines(tmp_path, b"") == lines(tmp_path, b"\n\r\n \n") == []


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path: Path) -> None:
    """Files that were put together have one in the middle too."""
    assert lines(tmp_path, "\ufeffa cat\n\ufeffa dog\n\ufeff\n".encode()) == ["a cat", "a dog"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "latin-1", "cp932"])
def test_other_encodings_are_refused_and_named(tmp_path: Path, encoding: str) -> None:
    text = "ein\nKäfer\n" if encoding != "cp932" else "one\n猫\n"
    with pytest.raises(ValueError, match=r"prompts\.txt: must be a text in UTF-8, ") as raised:
        lines(tmp_path, text.encode(encoding))
    marked = {"utf-16": "it is in UTF-16", "utf-32": "it is in UTF-32", "latin-1": "line 2 is not: byte 0xe4"}
    assert marked.get(encoding, "") in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-be"])
def test_plain_letters_without_a_mark_are_no_utf_8(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(ValueError, match="it holds characters of zeros as UTF-16 without a mark does"):
        lines(tmp_path, "a cat\n".encode(encoding))


def test_what_has_no_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="/dev/zero: must be a text of at most 16777216 bytes"):
        read_lines(Path("/dev/zero"))
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 40)
    with pytest.raises(ValueError, match="sparse: must be a text of at most"):
        read_lines(tmp_path / "sparse")


def test_a_pipe_is_read_to_its_end_and_one_without_a_writer_not_waited_for(tmp_path: Path) -> None:
    """As in `--prompts <(head all.txt)`."""
    reading, writing = os.pipe()
    os.set_blocking(reading, True)

    def write() -> None:
        for part in (b"a c", b"at\na d", b"og\n"):
            os.write(writing, part)
        os.close(writing)

    thread = threading.Timer(0.1, write)
    thread.start()
    assert read_lines(Path(f"/dev/fd/{reading}")) == ["a cat", "a dog"]
    thread.join()
    os.close(reading)
    os.mkfifo(tmp_path / "pipe")
    assert read_lines(tmp_path / "pipe") == []


@pytest.mark.parametrize(("kind", "error"), [("folder", IsADirectoryError), ("nothing", FileNotFoundError)])
def test_what_is_no_text(tmp_path: Path, kind: str, error: type[OSError]) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(error, match=kind):
        read_lines(tmp_path / kind)

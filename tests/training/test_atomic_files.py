"""A file appears whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from lesa_kernels.files import replacing


def test_a_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with replacing(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old" and unfinished.is_relative_to(tmp_path)
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_was_not_completed_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as unfinished:
            unfinished.write_text("half")
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        write_half()
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]

"""The repository's structure: file names, the files of an op, the folder of the integrations, the commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import house


@pytest.mark.parametrize("figure", house.figures(), ids=lambda figure: figure.name)
def test_no_figure_is_larger_than_allowed(figure: house.Figure) -> None:
    assert figure.most is None or figure.value <= figure.most


def test_the_files_of_an_op_exist_and_are_all() -> None:
    assert [file for file in house.template_files() if not (house.ROOT / file).is_file()] == []
    assert house.unlisted_template_files() == []


def test_file_names_occur_once() -> None:
    assert house.repeated_names() == {}


def test_floors_are_counted_along_the_longest_way(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        f"from lesa_kernels.{tmp_path.name}.b import x\nfrom lesa_kernels.{tmp_path.name}.c import y\n"
    )
    (tmp_path / "b.py").write_text(f"def f():\n    from lesa_kernels.{tmp_path.name}.c import y\n")
    (tmp_path / "c.py").write_text("import torch\n")
    arrows = house.imports_within(tmp_path)
    assert arrows == {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert house.floors(arrows) == 3

"""What is made of the results: the README's table, which must not be stale, and the picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import pages, report, results
from benchmarks.harness import COPY

ROW = results.Measurement(
    "predict", "4", "lesa::predict", 2e-3, 1e-3, 3e-3, 50.0, 0.5, None, "a device", 2, "2.13", "abc", "date", "run"
)
CASE = [ROW, replace(ROW, variant="eager", median_s=2e-2), replace(ROW, variant=COPY, median_s=1e-3, share_of_copy=1.0)]


def test_the_table_of_the_readme_is_that_of_the_committed_results() -> None:
    text = (report.ROOT / "README.md").read_text(encoding="utf-8")
    made = pages.renewed(text, report.COMMAND, report.markdown(results.load(report.RESULTS)))
    assert text == made, "run python -m benchmarks.report"


def test_a_case_is_a_line_with_its_ratios() -> None:
    assert report.markdown(CASE).splitlines()[-1] == "| `predict`, 4 | 2 | 50 | 50 % | eager 10x |"


def test_a_later_run_replaces_a_case_and_no_other() -> None:
    other = replace(ROW, op="push")
    later = replace(ROW, commit="def", median_s=5e-3)
    found = report.newest([*CASE, other, later])
    assert list(found.values()) == [[later], [other]]
    assert report.newest([*CASE, replace(ROW, device="another")]).keys() == {
        ("a device", 2, "predict", "4"),
        ("another", 2, "predict", "4"),
    }


def test_a_text_without_marks_is_refused() -> None:
    begin = pages.mark("x")
    for text in ("nothing", begin, pages.END + begin, 2 * (begin + pages.END)):
        with pytest.raises(ValueError, match="must hold <!-- made by x --> once"):
            pages.renewed(text, "x", "table")
    assert pages.renewed(f"a{begin}b{pages.END}c", "x", "table").splitlines()[2] == "table"


def test_the_command_writes_both(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{pages.mark(report.COMMAND)}\nold\n{pages.END}\nafter\n")
    results.save(CASE, tmp_path / "rows.csv")
    report.main(tmp_path / "rows.csv", readme, tmp_path / "new" / "picture.png")
    assert "eager 10x" in readme.read_text() and "old" not in readme.read_text()
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")

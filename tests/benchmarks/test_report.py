"""What is made of the results: the README's table, which must not be stale, and the picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import pages, predictions, report, results
from benchmarks.harness import COPY
from benchmarks.suite import suite, sweeps

ROW = results.Measurement(
    "predict", "4", "lesa::predict", 2e-3, 1e-3, 3e-3, 50.0, 0.5, None, "a device", 2, "2.13", "", "abc", "date", "run"
)
CASE = [ROW, replace(ROW, variant="eager", median_s=2e-2), replace(ROW, variant=COPY, median_s=1e-3, share_of_copy=1.0)]


@pytest.mark.parametrize("page", [report.ROOT / "README.md", report.PAGE], ids=lambda page: page.name)
def test_the_tables_are_those_of_the_committed_results(page: Path) -> None:
    text, rows = page.read_text(encoding="utf-8"), results.load(report.RESULTS)
    table = report.markdown(rows) if page == report.PAGE else report.readme_markdown(rows)
    made = pages.renewed(text, report.COMMAND, table)
    assert text == made, "run python -m benchmarks.report"


def test_the_predictions_are_those_of_the_page() -> None:
    text = predictions.PAGE.read_text(encoding="utf-8")
    assert text == pages.renewed(text, predictions.COMMAND, predictions.markdown()), f"run {predictions.COMMAND}"


def test_a_machine_ran_every_case() -> None:
    hooks = pytest.importorskip("benchmarks.hooks", reason="a cached step is one of diffusers' FLUX")
    wanted = Counter(entry.op for entry in [*suite(torch.device("cpu")), *sweeps()])
    cases = list(report.newest(results.load(report.RESULTS)))
    found = [Counter(op for device, _, op, _ in cases if device == machine) for machine in {case[0] for case in cases}]
    assert wanted + Counter([hooks.OP]) in found, "run the benchmark with --save, with --sweep --save, and the hooks"


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


def test_the_command_writes_tables_and_plots(tmp_path: Path) -> None:
    texts = [tmp_path / "readme.md", tmp_path / "page.md"]
    for text in texts:
        text.write_text(f"before\n{pages.mark(report.COMMAND)}\nold\n{pages.END}\nafter\n")
    compiled = replace(ROW, variant="torch.compile of it", median_s=4e-3)
    shown = [
        replace(row, size="FLUX 1024x1024, K=8, bfloat16", variant=row.variant.replace("eager", report.EAGER))
        for row in [*CASE, compiled]
    ]
    swept = [
        replace(row, op=op, size=size)
        for op, size in (
            ("elements", "64 elements, K=8, M=1, bfloat16"),
            ("elements", "256 elements, K=8, M=1, bfloat16"),
            ("inputs", "FLUX 1024x1024, K=4, M=1, bfloat16"),
            ("rows", "FLUX 1024x1024, K=8, M=6, bfloat16"),
        )
        for row in CASE
    ]
    results.save([*CASE, *shown, *swept], tmp_path / "rows.csv")
    report.main(tmp_path / "rows.csv", *texts, tmp_path / "new")
    readme, page = (text.read_text() for text in texts)
    assert "old" not in readme + page and "elements" not in readme + page
    assert readme.splitlines()[-4] == "| `predict`: one forecast from 8 features | 2 | 2x | 10x |"
    assert page.count("eager 10x") == 1 and page.count("eager form 10x") == 1
    for name in ("bandwidth.png", "time.png"):
        assert (tmp_path / "new" / name).read_bytes().startswith(b"\x89PNG")

"""Two commits in one run."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import compare, harness, results, suite


def test_two_commits_are_compared_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "BUILD", tmp_path)
    kan = next(number for number, entry in enumerate(suite.suite(torch.device("cpu"))) if entry.op == "kan_linear")
    with compare.Worker(compare.ROOT, "cpu") as base, compare.Worker(compare.ROOT, "cpu") as here:
        title, rows = compare.compare(base, here, kan, repeats=3)
        assert not isinstance(rows, str), rows
        assert title.startswith("kan_linear at") and [len(row.base) for row in rows] == [3] * len(rows)
        assert {row.variant for row in rows} >= {"lesa::kan_linear and autograd", harness.COPY}
        assert compare.table(title, rows).row_count == len(rows)
    (tmp_path / "empty").mkdir()
    with compare.Worker(tmp_path / "empty", "cpu") as base, pytest.raises(RuntimeError, match="do not run on empty"):
        base.ask(open=0)


def test_two_commits_take_turns_in_going_first() -> None:
    asked: list[str] = []

    class Fake(compare.Worker):
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def ask(self, **request: object) -> object:
            if "open" in request:
                return {"title": "a case", "variants": ["x", self.name]}
            asked.append(f"{self.name} {request['round']}")
            return {"x": 100.0 if request["round"] == 0 else self.seconds, self.name: 1.0}

    title, rows = compare.compare(Fake("base", 3.0), Fake("here", 1.5), 0, repeats=2)
    assert asked == ["here 0", "base 0", "base 1", "here 1", "here 2", "base 2"]
    assert title == "a case" and rows == [compare.Compared("x", [3.0, 3.0], [1.5, 1.5])]
    assert list(compare.table(title, rows).columns[-1].cells) == ["2.00"]  # times as fast


def test_a_commit_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="--baseline must name a commit, got nothing-like-it"):
        compare.checked_out("nothing-like-it", "cpu", Console())


def _repository(folder: Path, *names: str) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments], cwd=folder, check=True)

    git("init", "--quiet")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    git("add", *names)
    git("commit", "--quiet", "-m", "x")


def test_results_of_an_earlier_run_do_not_make_a_commit_dirty(tmp_path: Path) -> None:
    assert results.commit(tmp_path) == "unknown"
    _repository(tmp_path, "setup.py", "benchmarks/results.csv")
    clean = results.commit(tmp_path / "benchmarks")
    (tmp_path / "benchmarks/results.csv").write_text("a row")
    assert results.commit(tmp_path / "benchmarks") == clean
    (tmp_path / "setup.py").write_text("something else")
    assert results.commit(tmp_path / "benchmarks") == f"{clean}-dirty"


def test_a_checkout_that_was_deleted_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _repository(tmp_path, "setup.py")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "BUILD", tmp_path / "build")
    for _ in range(2):
        assert (compare.checked_out("HEAD", "cpu", Console()) / "setup.py").exists()
        shutil.rmtree(tmp_path / "build")

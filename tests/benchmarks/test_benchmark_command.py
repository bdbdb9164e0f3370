"""The command: what it measures, saves and reports."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from fake_clocks import ORIGIN, case_of
from small_cases import MAKERS
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import harness, results, suite
from benchmarks.clock import CpuClock
from lesa_kernels.ops import Tolerance


def test_the_command_measures_and_saves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries = [suite.Entry(op, MAKERS[op]) for op in ("push", "predict", "push")]
    monkeypatch.setattr(command, "suite", lambda device: entries)
    path = tmp_path / "out.csv"

    app = typer.Typer()
    app.command()(command.main)

    def run(*arguments: str) -> str:
        output = CliRunner().invoke(app, ["--repeats", "3", *arguments]).output
        return " ".join(output.replace("│", " ").split())  # messages stand in boxes

    assert "appended to out.csv" in run("--op", "push", "--save", "--out", str(path))
    assert {row.op for row in results.load(path)} == {"push"} and len(results.load(path)) == 2 * 3
    assert "3 cases left out: 0 seconds are over" in run("--seconds", "0")
    assert "must name an op" in run("--op", "nothing")
    assert "got nothing" in run("--op", "push", "--op", "nothing")
    for device in ("meta", "nowhere", "cuda:63"):
        assert f"--device must be cpu or a GPU that is there, got {device}" in run("--device", device)
    assert "--isa must be one that _cpu was compiled for and this processor runs, got mmx" in run("--isa", "mmx")
    for option in (["--sweep"], ["--save"], ["--seconds", "1"], ["--isa", "avx2"]):
        assert f"{option[0]} and --baseline exclude each other" in run("--baseline", "HEAD", *option)


def test_a_run_says_what_was_wrong_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(clock: CpuClock) -> harness.Case:
        raise RuntimeError("out of memory")

    def wrong(clock: CpuClock) -> harness.Case:
        run = harness.Variant("lesa::predict", lambda turn: [torch.zeros(4)], Tolerance(0, 0))
        return case_of(1.0, run, harness.Variant(harness.COPY, lambda turn: [torch.ones(4)], None))

    entries = [suite.Entry("broken", broken), suite.Entry("push", MAKERS["push"])]
    monkeypatch.setattr(command, "headline", lambda device: entries)
    app, lines = typer.Typer(), tmp_path / "lines.jsonl"
    app.command()(command.main)

    def run(*arguments: str) -> tuple[int, list[dict[str, object]]]:
        lines.unlink(missing_ok=True)
        code = CliRunner().invoke(app, ["--headline", "--repeats", "3", "--jsonl", str(lines), *arguments]).exit_code
        return code, [json.loads(line) for line in lines.read_text().splitlines()]

    code, found = run()
    assert code == 0 and len(found) == 4
    assert (found[0]["op"], found[0]["dropped"], found[0]["variant"]) == ("broken", "RuntimeError: out of memory", "")
    assert [line["variant"] for line in found[1:]] == ["lesa::push", "Tensor.copy_", harness.COPY]
    entries.append(suite.Entry("wrong", wrong))
    code, found = run("--part", "2/2")
    assert code == 0 and {line["op"] for line in found} == {"push"}
    code, found = run("--part", "3/3", "--save", "--out", str(tmp_path / "out.csv"))
    assert code == 1 and [(line["variant"], line.get("wrong")) for line in found] == [
        ("lesa::predict", True),
        (harness.COPY, None),
    ]
    assert [row.variant for row in results.load(tmp_path / "out.csv")] == [harness.COPY]
    code, found = run("--only-compile")
    assert code == 0 and [line["op"] for line in found] == ["broken", "push", "push", "push", "predict", "predict"]
    assert all("first_call_s" in line for line in found[1:])
    for part in ("0/2", "3/2", "1", "x/y"):
        assert CliRunner().invoke(app, ["--part", part]).exit_code == 2


def test_rows_of_older_versions_are_kept(tmp_path: Path) -> None:
    path, facts = tmp_path / "results.csv", {"extra_bytes": 7, "share_of_peak": 0.5, "host_no_grad_us": 3.0}
    row = replace(harness.row_of("predict", "4", "x", [1.0, 2.0, 3.0], ORIGIN, moved_bytes=16, copy=1.0), **facts)
    results.save([row], path)
    with path.open(newline="") as file:
        old = next(csv.DictReader(file))
    for name in (*facts, "host_inference_us"):
        del old[name]
    path.write_text(",".join(old) + "\n" + ",".join(old.values()) + "\n")
    results.save([row], path)
    assert results.load(path) == [replace(row, **dict.fromkeys(facts)), row]
    path.write_text("strange\n1\n")
    with pytest.raises(ValueError, match="got strange"):
        results.save([row], path)


def test_the_committed_results_are_readable() -> None:
    assert len(results.load(command.RESULTS)) > 0

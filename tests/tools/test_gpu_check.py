"""The control flow of `make gpu-check`: it stops at the first failure, and the report says what happened."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import results, targets
from benchmarks.results import Measurement
from tools.gpu_check import __main__ as command
from tools.gpu_check import facts, report, stages
from tools.gpu_check.processes import Job, join_logs, run_all
from tools.gpu_check.stages import FAILED, LEFT_OUT, PASSED, Outcome, Settings


def _python(name: str, code: str, folder: Path) -> Job:
    return Job(name, [sys.executable, "-c", code], folder / f"{name}.log")


def _settings(out: Path, device: str = "cpu") -> Settings:
    return Settings(device, "9.0", out, None, 2, 40.0, 3)


def test_the_first_failure_ends_the_others_and_what_waits_is_not_started(tmp_path: Path) -> None:
    jobs = [
        _python("slow", "import time; print('begun', flush=True); time.sleep(60)", tmp_path),
        _python("bad", "import time; time.sleep(0.5); raise SystemExit(3)", tmp_path),
        _python("late", "print('never')", tmp_path),
    ]
    begin = time.monotonic()
    run_all(jobs, tmp_path, os.environ, 30, at_once=2)
    assert time.monotonic() - begin < 10
    assert [job.code for job in jobs] == [None, 3, None] and [job.failed for job in jobs] == [False, True, False]
    join_logs(jobs, tmp_path / "all.log")
    assert "begun" in (tmp_path / "all.log").read_text() and "never" not in (tmp_path / "all.log").read_text()


def test_what_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    spawn = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    job = _python("spawns", spawn, tmp_path)
    run_all([job], tmp_path, os.environ, 2.0, at_once=1)
    assert job.timed_out and job.code is None and not job.failed
    assert _ends(int(job.text().split()[-1]))


def _ends(pid: int) -> bool:
    """Whether a process is gone soon, or only waits for its new parent to collect it."""
    state = Path(f"/proc/{pid}/status")
    for _ in range(50):
        if not state.exists() or "State:\tZ" in state.read_text():
            return True
        time.sleep(0.1)
    return False


def test_all_jobs_run_where_a_failure_does_not_stop_them(tmp_path: Path) -> None:
    jobs = [_python("bad", "raise SystemExit(1)", tmp_path), _python("good", "print(1)", tmp_path)]
    run_all(jobs, tmp_path, os.environ, 30, at_once=1, stop_at_failure=False)
    assert [job.code for job in jobs] == [1, 0]


@pytest.mark.parametrize(
    ("code", "text", "status"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", PASSED),
        (86, "========= ERROR SUMMARY: 2 errors", FAILED),
        (86, "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", FAILED),
        (1, "1 failed\n========= ERROR SUMMARY: 0 errors", FAILED),
        (1, "========= Error: Device not supported", LEFT_OUT),
    ],
)
def test_a_sanitizer_that_cannot_run_proves_nothing(code: int, text: str, status: str, tmp_path: Path) -> None:
    job = _python("memcheck", f"print({text!r}); raise SystemExit({code})", tmp_path)
    run_all([job], tmp_path, os.environ, 30, at_once=1)
    assert stages._sanitizer_verdict(job)[0] == status


def _suite(root: Path, **files: str) -> None:
    """A small repository with tests in folders."""
    (root / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    for name, code in files.items():
        path = root / "tests" / name / f"test_{name}.py"
        path.parent.mkdir(parents=True)
        path.write_text(code)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A repository whose stages run with this interpreter."""
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "WORK", tmp_path / "build")
    monkeypatch.setattr(stages, "venv_python", lambda: Path(sys.executable))
    return tmp_path


def test_the_test_stage_counts_and_gives_reasons(small: Path) -> None:
    skip = "import pytest\n@pytest.mark.skip(reason='no tool')\ndef test_a(): pass\ndef test_b(): pass\n"
    whole = "import pytest\npytest.skip('no package', allow_module_level=True)\n"
    _suite(small, gpu="def test_a(): pass\n", ops=skip, demo=whole)
    outcome = stages.test(_settings(small))
    assert (outcome.status, outcome.summary) == (PASSED, "2 passed, 2 skipped")
    assert {"skipped 1 x: no tool", "skipped 1 x: no package"} <= set(outcome.lines)
    assert outcome.lines[0].startswith("tests/gpu: 1 passed")
    assert "==== ops" in (small / "test.log").read_text()


def test_the_test_stage_fails_with_the_first_wrong_result(small: Path) -> None:
    _suite(small, gpu="def test_a(): assert 1 == 2\n", core="def test_a(): pass\n")
    outcome = stages.test(_settings(small))
    assert (outcome.status, outcome.summary) == (FAILED, "tests/gpu failed")
    assert any("assert 1 == 2" in line for line in outcome.lines)


def test_tests_that_do_not_end_have_not_passed(small: Path) -> None:
    _suite(small, gpu="import time\ndef test_a(): time.sleep(60)\n")
    outcome = stages.test(replace(_settings(small), seconds_left=3.0))
    assert (outcome.status, outcome.summary) == (FAILED, "not finished within 3 s: gpu")


def test_a_benchmark_that_refuses_a_wrong_kernel_fails(small: Path) -> None:
    package = small / "benchmarks"
    package.mkdir()
    (package / "__main__.py").write_text("raise ValueError('output 0 of lesa::predict must match the reference')")
    outcome = stages.bench(_settings(small))
    assert outcome.status == FAILED and "must match the reference" in outcome.lines[-1]
    (package / "__main__.py").write_text("print('3 cases left out: 16 seconds are over')")
    outcome = stages.bench(_settings(small))
    assert outcome.status == PASSED and "3 cases left out" in outcome.summary


Check = Callable[..., tuple[int, dict[str, object]]]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Check:
    """Runs the command with stages that end as they are told to; returns its status and the report."""

    def run(endings: dict[str, str], *arguments: str) -> tuple[int, dict[str, object]]:
        ran: list[str] = []

        def stage(name: str, status: str) -> Callable[[Settings], Outcome]:
            return lambda settings: ran.append(name) or Outcome(status, f"{name} {status}", ["a line"])  # type: ignore[func-returns-value]

        for name, status in endings.items():
            monkeypatch.setitem(command.STAGES, name, stage(name, status))
        monkeypatch.setattr(command, "_facts", lambda device: {"device": "a device", "torch": "2"})
        app = typer.Typer()
        app.command()(command.main)
        result = CliRunner().invoke(app, ["--out", str(tmp_path), *arguments])
        content = json.loads((tmp_path / "report.json").read_text())
        assert [entry["stage"] for entry in content["stages"]] == ran
        return result.exit_code, content

    return run


ALL_WELL = dict.fromkeys(stages.STAGES, PASSED)


def test_nothing_is_timed_after_a_wrong_result(check: Check, tmp_path: Path) -> None:
    code, content = check({**ALL_WELL, "test": FAILED}, "--device", "cpu")
    assert code == 1 and content["passed"] is False and content["not_run"] == ["sanitize", "bench"]
    page = (tmp_path / "report.md").read_text()
    assert "| test | FAILED |" in page and "| bench | not run |" in page and "a line" in page


def test_a_stage_that_could_not_run_here_is_no_failure(check: Check) -> None:
    code, content = check({**ALL_WELL, "sanitize": LEFT_OUT}, "--device", "cpu")
    assert code == 0 and content["passed"] is True and content["not_run"] == []
    assert len(content["stages"]) == len(stages.STAGES)  # type: ignore[arg-type]


def test_stages_can_be_chosen_and_old_results_do_not_survive(check: Check, tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text("old")
    code, content = check(ALL_WELL, "--stage", "build", "--stage", "bench")
    assert code == 0 and content["targets"] == [] and not (tmp_path / "results.csv").exists()
    assert [entry["stage"] for entry in content["stages"]] == ["build", "bench"]  # type: ignore[attr-defined]


def test_the_report_says_which_targets_were_met(tmp_path: Path) -> None:
    first, second, *_ = targets.targets()
    common = {"p20_s": 1.0, "p80_s": 1.0, "gb_per_s": 1.0, "share_of_copy": 1.0, "extra_bytes": None, "device": "d"}
    origin = {"threads": 1, "torch": "2", "cuda": "12.8", "commit": "c", "date": "d", "command": "x"}
    medians = {first.ours: 1.0, first.against: first.at_least, second.against: second.at_least / 2}
    rows = [
        Measurement(op=first.op, size=first.size, variant=name, median_s=seconds, **common, **origin)  # type: ignore[arg-type]
        for name, seconds in medians.items()
    ]
    results.save(rows, tmp_path / "results.csv")
    verdicts = report.verdicts_of(tmp_path, "cuda")
    assert report.verdicts_of(tmp_path, "cpu") == []
    report.write(tmp_path, {"device": "d"}, [], [], verdicts, "command")
    page = (tmp_path / "report.md").read_text()
    assert f"| >= {first.at_least:g} | {first.at_least:.3f} | met |" in page
    assert f"| >= {second.at_least:g} | {second.at_least / 2:.3f} | NOT MET |" in page
    assert page.count("not measured") == len(verdicts) - 2


def test_facts_name_the_machine_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = facts.facts(facts.torch.device("cpu"))
    assert found["device"] and found["torch"].startswith(facts.torch.__version__) and found["nvcc"] == "not found"

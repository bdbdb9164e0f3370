"""`make gpu-check`: how records are kept, how phases follow each other, what a wrong kernel and a slow one come to."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from benchmarks import harness
from tools.gpu_check import counters, full_size, gpu_report, gpu_suite, headline, memcheck, pack, phases, smoke
from tools.gpu_check.calls import CALLS, ODD, error_of
from tools.gpu_check.launches import titles
from tools.gpu_check.load import BUILD_SECONDS
from tools.gpu_check.phases import CALLS as COMMANDS
from tools.gpu_check.phases import Phase, run_phases
from tools.gpu_check.processes import Job, run_all
from tools.gpu_check.records import CUT, FAILED, LEFT_OUT, PASSED, SUMMARY, Record, append, load, worst
from tools.gpu_check.settings import FILES, RECORDS, REPORT, Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("out", "work/logs"):
        (tmp_path / name).mkdir(parents=True)
    return Settings("cpu", tmp_path / "out", tmp_path / "work", tmp_path / "pack")


def python(name: str, code: str, folder: Path) -> Job:
    return Job(name, [sys.executable, "-c", code], folder / f"{name}.log")


def test_a_record_that_was_cut_off_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / RECORDS
    kept = Record("smoke", "predict", FAILED, "off by 3", 0.5, {"of_allowed": 7.0})
    append(kept, path)
    with path.open("a") as file:
        file.write('{"phase": "smo')
    assert load(path) == [kept] and load(tmp_path / "missing") == []


def test_a_failure_stops_no_other_job(tmp_path: Path) -> None:
    jobs = [python("bad", "raise SystemExit(3)", tmp_path), python("good", "print(1)", tmp_path)]
    ended: list[str] = []
    run_all(jobs, tmp_path, os.environ, 30, ended=lambda job: ended.append(job.name))
    assert [job.code for job in jobs] == [3, 0] and ended == ["bad", "good"]


def test_what_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    sleeper = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    spawn = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleeper!r}])"
    job = python("spawns", spawn, tmp_path)
    run_all([job], tmp_path, os.environ, 3.0)
    assert job.timed_out and job.code is None
    assert _ends(int(job.text().split()[-1]))


def _ends(pid: int) -> bool:
    """Whether a process is gone soon, or only waits for its new parent to collect it."""
    state = Path(f"/proc/{pid}/status")
    for _ in range(50):
        if not state.exists() or "State:\tZ" in state.read_text():
            return True
        time.sleep(0.1)
    return False


def test_a_job_out_of_time_is_cut_and_a_crashed_one_has_failed(settings: Settings) -> None:
    slow, bad = (settings.job(name, [sys.executable, "-c", code]) for name, code in SLOW_AND_BAD)
    run_all([slow, bad], settings.out, os.environ, 1.5, 2, lambda job: settings.record_end("a phase", job))
    ends = {record.name: record for record in load(settings.out / RECORDS)}
    assert ends["slow"].status == CUT
    assert ends["bad"].status == FAILED and "RuntimeError: no" in ends["bad"].text


SLOW_AND_BAD = [("slow", "import time; time.sleep(60)"), ("bad", "raise RuntimeError('no')")]


def test_a_job_that_never_started_is_cut(settings: Settings) -> None:
    jobs = [settings.job(name, [sys.executable, "-c", "import time; time.sleep(60)"]) for name in ("slow", "waiting")]
    run_all(jobs, settings.out, os.environ, 1.0, 1, lambda job: settings.record_end("a phase", job))
    assert [(record.name, record.status) for record in load(settings.out / RECORDS)] == [
        ("slow", CUT),
        ("waiting", CUT),
    ]


@pytest.mark.parametrize(
    ("variant", "reason", "wrong", "status"),
    [
        ("lesa::predict", "off by 3", True, FAILED),
        ("lesa::predict", "RuntimeError: no", False, FAILED),
        ("lesa::predict, captured", "RuntimeError: not inside of a capture", False, LEFT_OUT),
        ("lesa::predict, captured", "off by 3", True, FAILED),
        ("torch.compile of it", "off by 3", True, LEFT_OUT),
        ("torch.compile of it", "AcceleratorError: CUDA error: an illegal memory access", False, FAILED),
        ("torch.compile of it", harness.NO_TIME, False, CUT),
        ("", harness.NO_TIME, False, CUT),
    ],
)
def test_what_the_benchmark_drops_counts_where_it_is_ours(variant: str, reason: str, wrong: bool, status: str) -> None:
    dropped = harness.Dropped("predict", "4", variant, reason, wrong, harness.is_ours(variant))
    assert headline.status_of(asdict(dropped)) == status


@pytest.mark.parametrize("loaded", [True, False])
def test_the_headline_runs_where_compiled_kernels_serve(
    loaded: bool, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headline, "run_all", lambda jobs, *_: None)
    on_gpu = replace(settings, device="cuda")
    on_gpu.record(Record("load", "first launch", PASSED if loaded else LEFT_OUT))
    headline.run(on_gpu, 60)
    last = load(settings.out / RECORDS)[-1]
    assert (last.status == LEFT_OUT and "do not serve" in last.text) is not loaded


def test_every_op_is_checked_on_both_engines_and_captured_at_first_by_the_compiled_one() -> None:
    found = smoke.wanted("cuda")
    assert {(engine, *ops) for engine, ops, options in found if not options} == {
        (engine, op) for engine in ("lesa", "triton") for op in CALLS
    }
    assert [(engine, ops) for engine, ops, options in found if options] == [("lesa", [op]) for op in CALLS]


def _records(*statuses: str) -> Callable[[Settings, float], None]:
    def run(settings: Settings, seconds: float) -> None:
        for status in statuses:
            settings.record(Record("p", "a check", status, f"it {status}"))

    return run


def _raises(settings: Settings, seconds: float) -> None:
    raise ImportError("no module named anything")


def test_no_phase_stops_another_and_the_report_says_how_each_ended(settings: Settings) -> None:
    chosen = [
        Phase("wrong", 9, _records(PASSED, FAILED)),
        Phase("broken", 9, _raises),
        Phase("slow", 9, _records(PASSED, CUT)),
        Phase("absent", 9, _records(LEFT_OUT)),
        Phase("right", 9, _records(PASSED, LEFT_OUT)),
    ]
    ends = {end.phase: end.status for end in run_phases(chosen, settings, 60)}
    assert ends == {"wrong": FAILED, "broken": FAILED, "slow": CUT, "absent": LEFT_OUT, "right": PASSED}
    page = (settings.out / REPORT).read_text()
    assert "| wrong | FAILED |" in page and "| slow | cut |" in page and "no module named anything" in page


def test_a_phase_without_time_is_cut_and_the_time_of_a_call_bounds_each(settings: Settings) -> None:
    given: list[float] = []
    phase = Phase("p", 50, lambda settings, seconds: given.append(seconds))
    assert [end.status for end in run_phases([phase], settings, phases.PACKING_SECONDS + 1)] == [CUT]
    list(run_phases([phase], settings, phases.PACKING_SECONDS + 20))
    list(run_phases([phase], settings, 500))
    assert len(given) == 2 and 19 < given[0] < 20 and given[1] == 50


def test_the_calls_leave_room_for_a_repair() -> None:
    """15 minutes in all, of which starts and transfers take some; what was carried need not be built."""
    (first, first_limit), (second, second_limit) = COMMANDS["first"], COMMANDS["second"]
    assert first_limit <= 300 and first_limit + second_limit <= 720
    for chosen, limit in ((first, first_limit), (second, second_limit)):
        assert sum(phase.seconds for phase in chosen) - BUILD_SECONDS + phases.PACKING_SECONDS <= limit
    assert len(FILES) <= 6


def test_worst_takes_a_wrong_number_before_what_was_cut() -> None:
    assert worst([PASSED, CUT, FAILED, LEFT_OUT]) == FAILED
    assert worst([PASSED, CUT]) == CUT
    assert worst([LEFT_OUT, PASSED]) == PASSED
    assert worst([LEFT_OUT]) == worst([]) == LEFT_OUT


def _wrong_at(position: int, value: float) -> Any:
    """Ops of which predict's result is wrong at one place."""

    def predict(*arguments: Any) -> Tensor:
        out: Tensor = torch.ops.lesa.predict(*arguments).clone()
        out.view(-1)[position] = value
        return out

    return SimpleNamespace(predict=predict)


@pytest.mark.parametrize(("value", "nans"), [(1e3, 0), (torch.nan, 1)])
def test_smoke_says_which_element_is_wrong(value: float, nans: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "namespaces", lambda: {"lesa": _wrong_at(1234, value)})
    found: list[Record] = []
    smoke.check_op("predict", "lesa", "cpu", [("values", smoke.values, torch.float32, ODD)], found.append)
    (record,) = found
    assert record.status == FAILED and "first at element 1234" in record.text and f"{nans} NaN" in record.text
    assert record.values["outputs"][0]["first_bad"] == 1234 and record.values["of_allowed"] > 1


def test_smoke_sees_bits_that_change(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(range(100))
    ops = SimpleNamespace(predict=lambda *arguments: torch.full((3, 1031), float(next(turns))))
    monkeypatch.setattr(smoke, "namespaces", lambda: {"lesa": ops})
    found: list[Record] = []
    smoke.check_op("predict", "lesa", "cpu", [("same bits", smoke.same_bits, torch.float32, ODD)], found.append)
    assert found[0].status == FAILED and "other bits" in found[0].text


def test_smoke_goes_on_after_an_error_and_ends_at_one_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(["shape must be right", "CUDA error: an illegal memory access was encountered"])
    answers = iter([True, False])

    def fails(*_: Any) -> None:
        raise RuntimeError(next(texts))

    monkeypatch.setattr(smoke, "alive", lambda device: next(answers))

    monkeypatch.setattr(smoke, "namespaces", lambda: {"lesa": SimpleNamespace(predict=fails)})
    found: list[Record] = []
    with pytest.raises(SystemExit, match="ends this process"):
        smoke.check_op("predict", "lesa", "cpu", smoke.checks("predict"), found.append)
    assert [record.status for record in found] == [FAILED, FAILED] and "illegal memory access" in found[1].text


@pytest.mark.parametrize("op", CALLS)
def test_an_error_is_measured_against_the_tolerance(op: str) -> None:
    call = CALLS[op](torch.float32, ODD)
    outputs = call.run(torch.ops.lesa)
    assert not call.wrong(outputs)
    assert call.wrong([output + 1e3 for output in outputs])


def test_errors_of_empty_and_of_exact_outputs() -> None:
    empty, one = torch.zeros(0), torch.ones(3, dtype=torch.float64)
    assert error_of(empty, empty.double(), empty.double()).first_bad is None
    assert error_of(one.float(), one, 0 * one).of_allowed == 0
    bad = error_of(torch.tensor([1.0, torch.nan, torch.nan]), one, one)
    assert (bad.first_bad, bad.nans, bad.largest) == (1, 2, torch.inf)


def _printed_by_ncu() -> list[str]:
    names = ["ID", "Kernel Name", *counters.METRICS.values()]
    units = ["", "", "us", "%", "Mbyte", "Kbyte", *[""] * (len(names) - 6)]
    rows = [["0", "spin_kernel(long)", *["1"] * len(counters.METRICS)]]
    rows += [["1", "combine<8>(Args)", "1,250.5", "91.5", "200", "1,000", *["7"] * (len(names) - 6)]]
    rows += [["2", "void spin_kernel(long)", *["1"] * len(counters.METRICS)]]
    rows += [
        ["3", "combine<8>(Args)", *["2"] * len(counters.METRICS)],
        ["4", "finish()", *["n/a"] * len(counters.METRICS)],
    ]
    quoted = [",".join(f'"{cell}"' for cell in row) for row in [names, units, *rows]]
    return ["==PROF== Connected to process 17", *quoted, "==PROF== Disconnected"]


def test_counters_belong_to_the_launch_behind_their_mark() -> None:
    found = counters.parsed(_printed_by_ncu())
    assert list(found) == titles()[:2]
    (first,), second = found.values()
    assert first["duration"] == 1250.5 and first["DRAM read"] == 200 and first["DRAM written"] == 1.0
    assert [kernel["kernel"] for kernel in second] == ["combine<8>(Args)", "finish()"]
    assert second[1]["duration"] == "n/a"
    assert counters.parsed(["==ERROR== no permission"]) == {}


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
    job = python("memcheck", f"print({text!r}); raise SystemExit({code})", tmp_path)
    run_all([job], tmp_path, os.environ, 30)
    assert memcheck.verdict(job)[0] == status


def test_each_test_is_a_record_as_soon_as_it_ends(settings: Settings, tmp_path: Path) -> None:
    tests = tmp_path / "test_some.py"
    tests.write_text(
        "import os, pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no tool')\ndef test_absent(): pass\n"
        "def test_killed(): os.kill(os.getpid(), 9)\n"
    )
    job = gpu_suite.job_of(settings, "tests", str(tests))
    run_all([job], Path.cwd(), settings.env(), 60, ended=lambda job: settings.record_end("tests", job))
    found = {record.name.rpartition("::")[2]: record for record in load(settings.out / RECORDS)}
    assert [found[name].status for name in ("test_right", "test_wrong", "test_absent")] == [PASSED, FAILED, LEFT_OUT]
    assert "assert 1 == 2" in found["test_wrong"].text
    assert found[job.name].status == FAILED and "exit status -9" in found[job.name].text


def test_the_listed_tests_are_there() -> None:
    root = Path(__file__).parents[2]
    assert [path for path in (*gpu_suite.TESTS, *gpu_suite.DIFFUSERS) if not (root / path).exists()] == []
    missing = {path.name for path in (root / "tests/gpu").glob("test_*.py")} - {
        Path(path).name for path in gpu_suite.TESTS
    }
    assert not missing, "name them in gpu_suite.TESTS"


def _package(folder: Path, architectures: str | None, sources: str | None = None) -> Path:
    folder.mkdir()
    for name in ("_cpu.so", "_cuda.so"):
        (folder / name).write_bytes(b"machine code")
    record = {"architectures": architectures, "sources": sources or pack.sources_digest()}
    (folder / "_build_info.json").write_text(json.dumps(record))
    return folder


def test_a_pack_needs_code_for_the_gpu(tmp_path: Path) -> None:
    assert len(pack.libraries(_package(tmp_path / "good", "80-real;90-real;90-virtual"))) == 3
    with pytest.raises(ValueError, match="must hold code for sm_90, it was built for 80-real"):
        pack.libraries(_package(tmp_path / "old", "80-real"))
    with pytest.raises(ValueError, match="must be built from csrc as it is now"):
        pack.libraries(_package(tmp_path / "stale", "90-real", "of another commit"))
    (tmp_path / "good" / "_cuda.so").unlink()
    with pytest.raises(ValueError, match=r"must hold _cuda\.so: run `make setup`"):
        pack.libraries(tmp_path / "good")


def test_a_report_shows_ops_counters_and_the_model(settings: Settings) -> None:
    record = settings.record
    right = {"op": "predict", "engine": "lesa", "check": "values", "of_allowed": 0.5}
    record(Record("smoke", "predict lesa", PASSED, values=right))
    record(Record("smoke", "predict triton", FAILED, "off", values={**right, "engine": "triton", "of_allowed": 40.0}))
    record(Record("smoke", SUMMARY, FAILED))
    record(
        Record("counters", "predict, lesa, kernel 0", PASSED, "combine", values={"duration": 47.25, "registers": 96})
    )
    times = {
        "plain_step_s": 0.2,
        "full_step_s": 0.21,
        "cached_step_s": 0.001,
        "run_s": 1.0,
        "run_of_plain_steps_s": 3.2,
    }
    model = {**times, "history_mib": 96.0, "parameters": 12e9, "calls": 16, "full_calls": 4}
    record(Record("full size", "enabled", PASSED, values=model))
    gpu_report.write(settings)
    page = (settings.out / REPORT).read_text()
    assert "| `predict` | lesa | passed | 1 | 0.5 |  |" in page
    assert "| `predict` | triton | FAILED | 1 | 40 | values |" in page
    assert "| predict, lesa, kernel 0 | 47.25 | 96 |" in page
    assert "| history | 96 MiB |" in page and "### smoke: predict triton" in page


def test_without_diffusers_no_model_of_full_size_is_timed(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    full_size.run(settings, 60)
    (record,) = load(settings.out / RECORDS)
    assert record.status == LEFT_OUT and "diffusers is not installed and was not carried" in record.text


def test_the_command_refuses_a_phase_that_is_none(tmp_path: Path) -> None:
    import typer

    from tools.gpu_check.__main__ import main

    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["first", "--device", "cpu", "--phase", "tests", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "--phase must be one of load, smoke" in " ".join(result.output.split())

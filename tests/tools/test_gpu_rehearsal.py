"""A rehearsal of `make gpu-check` on the CPU: with what travels to the machine, and with the packages that it has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import results
from tools.gpu_check import publish
from tools.gpu_check.phases import CALLS
from tools.gpu_check.records import LEFT_OUT, PASSED, SUMMARY, Record, load
from tools.gpu_check.settings import LOGS, RECORDS, REPORT, RESULTS

ROOT = Path(__file__).parents[2]
LISTED = Path(__file__).parent / "only_listed"
CARRIED = "diffusers importlib_metadata"
NEVER_RUN_WITHOUT_A_GPU = {"memcheck", "counters", "tests"}


def _checkout(folder: Path) -> Path:
    """Copy what git tracks, as a machine without git gets it, and the libraries as a pack."""
    listed = ["git", "-C", str(ROOT), "ls-files", "-z"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    pack = folder / "build" / "gpu-pack"
    pack.mkdir(parents=True)
    for name in ("_cpu.so", "_build_info.json"):
        shutil.copyfile(ROOT / "lesa_kernels" / name, pack / name)
    (pack / "pack.json").write_text('{"commit": "abc1234"}')
    return folder


def _rehearsed(folder: Path, call: str, also: str) -> dict[str, list[Record]]:
    """Run a call in a checkout with the listed packages; return the records of each phase."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_"))}
    env |= {"PYTHONPATH": str(LISTED), "LESA_ALSO_LISTED": also, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tools.gpu_check", call, "--device", "cpu", "--out", "report"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    records = load(folder / "report" / RECORDS)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.phase, []).append(record)
    return found


def _ends(found: dict[str, list[Record]]) -> dict[str, str]:
    return {phase: record.status for phase, records in found.items() for record in records if record.name == SUMMARY}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "lesa_kernels" / "_cpu.so").exists():
        pytest.skip("the CPU library was not built: nothing could be carried")
    return _checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def first(checkout: Path) -> dict[str, list[Record]]:
    return _rehearsed(checkout, "first", "")


def test_every_phase_of_the_first_call_runs_with_the_packages_of_the_machine(first: dict[str, list[Record]]) -> None:
    ends = _ends(first)
    assert list(ends) == [phase.name for phase in CALLS["first"][0]]
    assert {name for name, status in ends.items() if status != PASSED} <= NEVER_RUN_WITHOUT_A_GPU
    assert "_cpu.so" in first["load"][0].text
    values = [record for record in first["smoke"] if record.values.get("check") == "values"]
    assert {record.status for record in values if record.values["engine"] == "lesa"} == {PASSED}
    assert {record.status for record in values if record.values["engine"] == "triton"} == {LEFT_OUT}


def test_the_report_holds_what_was_found_and_is_published(
    first: dict[str, list[Record]], checkout: Path, tmp_path: Path
) -> None:
    report = tmp_path / "first"
    shutil.copytree(checkout / "report", report)
    assert {RECORDS, RESULTS, REPORT, LOGS} <= {path.name for path in report.iterdir()}
    table = checkout / "benchmarks/results.csv"
    known = results.load(table)
    subprocess.run([sys.executable, "-m", "tools.gpu_check.publish", str(report)], cwd=checkout, check=True)
    added = results.load(table)[len(known) :]
    assert len(added) == len(results.load(report / RESULTS)) > 0 and {row.commit for row in added} == {"abc1234"}
    assert publish.new_rows([report], results.load(table)) == []
    assert "| `predict` | lesa | passed |" in (checkout / "docs/gpu.md").read_text()
    assert "10 of 10 ops right on CUDA, 0 of 10 ops right on Triton" in (checkout / "README.md").read_text()


def test_the_second_call_runs_what_was_carried(checkout: Path, first: dict[str, list[Record]]) -> None:
    found = _rehearsed(checkout, "second", CARRIED)
    ends = _ends(found)
    assert list(ends) == [phase.name for phase in CALLS["second"][0]]
    assert {name for name, status in ends.items() if status != PASSED} <= NEVER_RUN_WITHOUT_A_GPU
    figures = next(record.values for record in found["full size"] if record.name == "enabled")
    assert figures["full_calls"] == 4 and figures["cached_step_s"] > 0


def test_tests_that_need_a_missing_package_are_left_out_and_the_rest_is_collected() -> None:
    env = os.environ | {"PYTHONPATH": str(LISTED)}
    command = [sys.executable, "-m", "pytest", "tests", "--collect-only", "-q", "-p", "no:cacheprovider", "-n", "0"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]

"""How programs end: Ctrl-C in every phase, outputs that are closed, full or no longer read; never a traceback."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LESA = "import lesa_command; lesa_command.main()"
DIGITS = "import lesa_command; lesa_command.run(lambda: __import__('digits_command').program())"
INTERRUPTED = (130, "Interrupted.\n")


def small(program: str = "pass", load: str = "pass") -> list[str]:
    """Return the command of a program without torch."""
    code = f"""
import lesa_command, os, sys, time
def load():
    {load}
    def program():
        {program}
    return program
lesa_command.run(load)
"""
    return [sys.executable, "-c", code]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, Path(__file__).parent)))}


def ended(command: list[str], redirection: str = "") -> tuple[int, str]:
    """Run a command by a shell; returns its exit code, not that of a reader, and what it said of errors."""
    line = f'set -o pipefail; "$@" {redirection}; exit ${{PIPESTATUS[0]}}'
    shell = ["bash", "-c", line, "bash", *command]
    result = subprocess.run(
        shell, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120
    )
    return result.returncode, result.stderr


def interrupted(command: list[str], after: float | str) -> tuple[int, str]:
    """Send SIGINT after so many seconds, or after a line; returns the exit code and what was said of errors."""
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        if isinstance(after, str):
            while not (line := process.stdout.readline()).startswith(after):
                assert line, after
        else:
            time.sleep(after)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    return process.returncode, said


LONG = "print('x' * 100_000)"


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">/dev/full", 1, "The output cannot be written: No space left on device.\n"),
        ("| head -c 0", 1, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">&- 2>&-", 0, ""),
        ("<&-", 0, ""),
        (">/dev/full 2>/dev/full", 1, ""),
    ],
)
@pytest.mark.parametrize("program", [LONG, f"{LONG}; time.sleep(0.2); {LONG}"])
def test_an_output_that_takes_nothing(program: str, redirection: str, code: int, said: str) -> None:
    assert ended(small(program), redirection) == (code, said)


@pytest.mark.parametrize(
    ("arguments", "redirection", "code"),
    [
        ("status", ">/dev/full", 1),
        pytest.param("status", "| head -c 0", 1, marks=pytest.mark.exhaustive),
        pytest.param("status", ">&- 2>&-", 0, marks=pytest.mark.exhaustive),
        pytest.param("--help", ">/dev/full", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_an_output_of_lesa_that_takes_nothing(arguments: str, redirection: str, code: int) -> None:
    said = "The output cannot be written: No space left on device.\n" if "/dev/full" in redirection else ""
    assert ended([sys.executable, "-c", LESA, arguments], redirection) == (code, said)


def test_no_file_takes_the_place_of_a_closed_output(tmp_path: Path) -> None:
    """What is printed to the descriptor 1 would get into the file that was opened next."""
    write = f"file = open({str(tmp_path / 'file')!r}, 'w'); file.write('mine'); os.write(1, b'output'); print('output')"
    assert ended(small(write), ">&-") == (0, "")
    assert (tmp_path / "file").read_text() == "mine"


def test_errors_of_files_are_not_taken_for_those_of_the_output(tmp_path: Path) -> None:
    code, said = ended(small(f"open({str(tmp_path / 'none')!r})"))
    assert code == 1 and "FileNotFoundError" in said
    code, said = ended(small("raise OSError(28, 'No space left on device', 'weights')"))
    assert code == 1 and "'weights'" in said


def test_ctrl_c_while_loading_running_and_ending() -> None:
    begins = "print('begins', flush=True); "
    assert interrupted(small(load=begins + "time.sleep(60)"), "begins") == INTERRUPTED
    # What an import makes of it does not count.
    assert interrupted(small(load=f"{begins}\n    try: time.sleep(60)\n    except: raise ImportError"), "begins") == (
        INTERRUPTED
    )
    assert interrupted(small(begins + "time.sleep(60)"), "begins") == INTERRUPTED
    ending = "import atexit; atexit.register(lambda: (print('begins', flush=True), time.sleep(60)))"
    assert interrupted(small(ending), "begins") == INTERRUPTED


def test_a_program_that_does_not_hear_ctrl_c_stays_deaf() -> None:
    """As under nohup, or in the background of a script."""
    command = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", *small("time.sleep(0.5)", "print('begins', flush=True)")]
    assert interrupted(command, "begins") == (0, "")


def _train(folder: Path) -> list[str]:
    pytest.importorskip("diffusers", reason="diffusers is not installed (extra: train)")
    (folder / "prompts.txt").write_text("1\n2\n3\n4\n")
    return [sys.executable, "-c", DIGITS, "train", "digits", "--prompts", str(folder / "prompts.txt")]


SMALL = ["--steps", "14", "--interval", "4", "--batch", "2"]


@pytest.mark.exhaustive
def test_ctrl_c_while_the_pipeline_is_loaded(tmp_path: Path) -> None:
    command = [*_train(tmp_path), "--out", str(tmp_path / "out"), *SMALL]
    assert interrupted(command, "loading digits") == (
        130,
        "Interrupted: the same command goes on where it was stopped.\n",
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["train", "calibrate", "demo"])
def test_ctrl_c_at_random_moments(tmp_path: Path, name: str) -> None:
    """Once or twice, from the first moment to the last; in the end the same command comes to its end."""
    out = tmp_path / "out"
    options = {"train": ["--store", str(tmp_path / "store"), *SMALL], "calibrate": ["--steps", "14", "--search", "3"]}
    if name == "demo":
        command = [sys.executable, "-m", "examples.emoji", "--out", str(out), "--samples", "1", "--runs", "1"]
    else:
        command = [*_train(tmp_path), "--out", str(out), *options[name]]
        command[command.index("train")] = name
    begin = time.monotonic()
    assert ended(command) == (0, "")
    whole = time.monotonic() - begin
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    moments = random.Random(0)
    for _ in range(12):
        # Before Python has begun, there is nobody to hear it.
        code, said = interrupted(command, moments.uniform(0.3, whole))
        assert code in (0, 130) or (code == -signal.SIGINT and not said), said
        assert code != 130 or (said.startswith("Interrupted") and said.count("\n") == 1), said
    assert ended(command) == (0, "")
    assert not [path for path in out.rglob(".*") if path.name != ".lock"]

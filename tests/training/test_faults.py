"""Full disks, folders that cannot be written to, saves that are cut short, and two trainings in one folder."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import SCHEDULE, SIGMAS, Meddling, equal, runs, small_predictor
from torch import Tensor

from lesa_kernels import LesaPredictor, LinearPredictor, load_official, load_predictor
from lesa_kernels.files import read_lines, replacing, replacing_all
from lesa_kernels.training import FeatureStore, TrainingConfig, train
from lesa_kernels.training.checkpoint import FILE, Checkpoint
from lesa_kernels.training.ranks import lock_folder

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")

# From Python 3.12 on.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

FULL_DISK = Path(__file__).with_name("full_disk.py")
ONE = TrainingConfig(1, 0)


def refuse(_: Tensor) -> Tensor:
    raise AssertionError("nothing is to be run")


def told(command: list[str]) -> dict[str, dict[str, Any]]:
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    return {Path(line["path"]).name: line for line in lines}


def check(said: dict[str, Any], reason: str) -> None:
    assert said["kept"] and not said["more"] and said["path"] in said["said"]
    assert reason in said["said"] and "OSError" in said["said"]


@pytest.mark.parametrize(
    ("longest", "stopped"),
    [
        (100, {"predictor", "training", "store"}),
        pytest.param(100_000, {"training"}, marks=pytest.mark.exhaustive),
    ],
)
def test_a_file_that_finds_no_room(tmp_path: Path, longest: int, stopped: set[str]) -> None:
    """At 100 bytes nothing can be written; at 100 kB all but the checkpoint can."""
    said = told([sys.executable, str(FULL_DISK), str(tmp_path), str(longest)])
    assert {name for name, line in said.items() if line["said"] != "nothing"} == stopped
    for name in stopped:
        check(said[name], "cannot be written (")


@pytest.mark.exhaustive
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=1500k none {tmp_path}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("a file system of its own needs the right to mount one")
    python = f"exec {sys.executable} {FULL_DISK} {tmp_path}"
    said = told(["unshare", "-m", "sh", "-c", f"{mount} && {python}"])
    check(said["predictor"], "No space left on device")
    check(said["training"], "No space left on device")
    check(said["store"], "must fit on the disk")


def no_folder(path: Path) -> Path:
    """A place below a file: not even root can write there."""
    path.write_text("")
    return path / "out"


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder that others may enter and list; pytest's own they may not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def as_nobody(write: Callable[[], object]) -> str:
    """Run in a process without root's rights; returns what it said."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        said = "nothing"
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            write()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        said = answers.read()
    os.waitpid(child, 0)
    return said


WRITERS: dict[str, Callable[[Path], object]] = {
    "train": lambda out: train(small_predictor(), Meddling(runs(1), 0, refuse), SCHEDULE, ONE, out=out, progress=False),
    "record": lambda out: FeatureStore.record(out, Meddling(runs(1), 0, refuse), model="small", progress=False),
    "save": lambda out: small_predictor().save_pretrained(out),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_what_cannot_be_written_to_is_told_before_the_work(tmp_path: Path, read_only: Path, writer: str) -> None:
    out = no_folder(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match=str(out)):
        WRITERS[writer](out)
    said = as_nobody(lambda: WRITERS[writer](read_only))
    assert said.startswith("PermissionError") and str(read_only) in said
    said = as_nobody(lambda: WRITERS[writer](read_only / "out"))
    assert said.startswith("PermissionError") and str(read_only / "out") in said


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": lambda file: load_predictor(file.parent),
    "model.safetensors": lambda file: load_predictor(file.parent),
    "file.pt": load_official,
    "run-000000.safetensors": lambda file: FeatureStore(file.parent),
    "index.json": lambda file: FeatureStore(file.parent),
    FILE: lambda file: Checkpoint.load(file.parent),
    "prompts.txt": read_lines,
}


@pytest.mark.parametrize("name", READERS)
def test_what_may_not_be_read_is_named(read_only: Path, name: str) -> None:
    read_only.chmod(0o755)
    small_predictor().save_pretrained(read_only)
    FeatureStore.record(read_only, runs(1), model="small", progress=False)
    torch.save({"model": small_predictor().state_dict()}, read_only / "file.pt")
    Checkpoint({}, {}, [1.0]).save(read_only)
    (read_only / "prompts.txt").write_text("a cat\n")
    assert as_nobody(lambda: READERS[name](read_only / name)) == "nothing"
    (read_only / name).chmod(0)
    said = as_nobody(lambda: READERS[name](read_only / name))
    assert said.startswith("PermissionError") and str(read_only / name) in said


def test_a_branch_cannot_leave_the_folder(tmp_path: Path) -> None:
    for name in ("../other", "..", "", ".", "a/b", str(tmp_path / "absolute")):
        both = {"cond": small_predictor(0), name: small_predictor(1)}
        source = Meddling(runs(1), 0, refuse)
        with pytest.raises(ValueError, match="each branch gets a folder of its name in out"):
            train(both, source, SCHEDULE, ONE, out=tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", ["train", "record"])
def test_a_folder_in_use_is_refused(tmp_path: Path, writer: str) -> None:
    with lock_folder(tmp_path), pytest.raises(BlockingIOError, match=f"another process writes.*{tmp_path.name}"):
        WRITERS[writer](tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_process_that_dies_lets_go(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from lesa_kernels.training.ranks import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            with pytest.raises(BlockingIOError):
                train(small_predictor(), runs(1), SCHEDULE, ONE, out=tmp_path, progress=False)
        finally:
            process.send_signal(signal.SIGKILL)
    train(small_predictor(), runs(1), SCHEDULE, ONE, out=tmp_path, progress=False)
    train(small_predictor(), runs(1), SCHEDULE, ONE, out=tmp_path, progress=False)


def linear() -> LinearPredictor:
    predictor = LinearPredictor(SIGMAS, SCHEDULE.full_steps)
    predictor.coefficients[1:] = 0.25
    return predictor


@pytest.mark.parametrize("renames", range(4))
def test_a_save_that_is_cut_short_is_never_taken_for_a_predictor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Of two predictors whose configs and weights would fit together, and of two that would not."""
    for number, (old, new) in enumerate([(small_predictor(0), small_predictor(1)), (linear(), small_predictor(1))]):
        folder = tmp_path / str(number)
        old.save_pretrained(folder)
        if isinstance(old, LesaPredictor):
            new.trained_sigmas = SIGMAS
        replace, left = os.replace, [renames]

        def cut(*paths: Any, replace: Any = replace, left: list[int] = left) -> None:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            replace(*paths)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", cut)
            try:
                new.save_pretrained(folder)
                finished = True
            except KeyboardInterrupt:
                finished = False
        assert not [path for path in folder.iterdir() if "unfinished" in path.name]
        assert finished == (renames >= 2), "the README stays, the config and the weights are replaced"
        if renames == 1:
            with pytest.raises(ValueError, match=r"config\.json must be the config of the weights beside it"):
                load_predictor(folder)
            continue
        loaded = load_predictor(folder)
        want = new if finished else old
        assert type(loaded) is type(want)
        assert all(
            torch.equal(loaded.state_dict()[name], value)
            for name, value in want.state_dict().items()
            if name != "coefficients"
        )
        assert loaded.schedule == want.schedule and loaded.incompatibility(SIGMAS) == want.incompatibility(SIGMAS)


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    small_predictor().save_pretrained(tmp_path)
    left = tmp_path / ".model.safetensors.unfinished"
    left.mkdir()
    (left / "half").write_text("")
    small_predictor(1).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    assert equal(LesaPredictor.from_pretrained(tmp_path), small_predictor(1))


def test_a_readme_of_the_user_s_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    small_predictor().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_files_may_be_read_by_whom_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        small_predictor().save_pretrained(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640


def test_several_files_take_their_places_after_all_are_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with replacing_all(tmp_path, "pair") as folder:
        (folder / "a").write_text("new")
        (folder / "b").write_text("new")
        assert (tmp_path / "a").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}


def test_what_fails_in_between_stays_what_it_is(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "file"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["shape", "dtype", "name", "losses"])
def test_a_checkpoint_whose_tensors_are_others_is_refused(tmp_path: Path, change: str) -> None:
    """They would be broadcast, rounded or left out without a word."""
    train(small_predictor(), runs(1), SCHEDULE, ONE, out=tmp_path, progress=False)
    from safetensors import safe_open

    with safe_open(tmp_path / FILE, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(tmp_path / FILE)
    name = next(name for name in tensors if tensors[name].dim() == 2)
    if change == "shape":
        tensors[name] = tensors[name][:1, :1].clone()
    elif change == "dtype":
        tensors[name] = tensors[name].half()
    elif change == "name":
        tensors["other"] = tensors.pop(name)
    else:
        tensors["losses"] = torch.ones(5, dtype=torch.float64)
    save_file(tensors, tmp_path / FILE, metadata)
    with pytest.raises(ValueError, match=f"{FILE} must be the checkpoint of a training: it is not as its settings say"):
        train(small_predictor(), runs(1), SCHEDULE, ONE, out=tmp_path, progress=False)

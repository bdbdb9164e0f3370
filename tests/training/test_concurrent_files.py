"""Loads beside saves, and several saves at once: what is loaded is of one save, and the last save counts as a whole."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from saving_loop import of_seed
from small_training import SIGMAS, equal, runs, small_predictor

from lesa_kernels import LesaPredictor, files, load_official, load_predictor
from lesa_kernels.files import only_writer, opened, opened_tensors, replacing, writer_of
from lesa_kernels.predictors import saved
from lesa_kernels.training import FeatureStore
from lesa_kernels.training.checkpoint import FILE, Checkpoint

SAVING = Path(__file__).with_name("saving_loop.py")
WEIGHTS = "model.safetensors"


@contextmanager
def saving(*arguments: object, count: int = 1) -> Generator[subprocess.Popen[str], None, None]:
    """Run processes that save, until the end of the with statement; gives the last one."""
    command = [sys.executable, str(SAVING), *map(str, arguments)]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            for _ in range(count)
        ]
        for process in processes:
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == "begins\n"
        yield process
        for process in processes:
            said, _ = process.communicate(timeout=60)
            assert process.returncode == -signal.SIGKILL or (process.returncode == 0 and int(said) > 0), said


def seed_of(predictor: object) -> int:
    """Tell which of the two predictors it is, in all its parts."""
    assert isinstance(predictor, LesaPredictor)
    seed = int(predictor.trained_sigmas == tuple(SIGMAS))
    assert equal(predictor, of_seed(seed)), "parts of two predictors"
    return seed


def test_a_load_beside_saves_gives_one_of_the_predictors(tmp_path: Path) -> None:
    of_seed(0).save_pretrained(tmp_path)
    with saving(tmp_path, "one"):
        end = time.monotonic() + 2
        seeds = []
        while time.monotonic() < end or len(set(seeds)) < 2:
            seeds.append(seed_of(load_predictor(tmp_path)))
            seeds.append(seed_of(LesaPredictor.from_pretrained(tmp_path)))


@pytest.mark.parametrize("kind", ["one", pytest.param("two", marks=pytest.mark.exhaustive)])
def test_saves_at_once_all_succeed_and_one_of_them_counts(tmp_path: Path, kind: str) -> None:
    with saving(tmp_path, kind, count=2):
        time.sleep(0.5)
    folders = [tmp_path] if kind == "one" else [tmp_path / "cond", tmp_path / "uncond"]
    assert len({seed_of(load_predictor(folder)) for folder in folders}) == 1
    for folder in folders:
        assert {path.name for path in folder.iterdir()} == {"README.md", "config.json", WEIGHTS}
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_saves_of_threads_take_turns(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def save(seed: int) -> None:
        try:
            for _ in range(10):
                of_seed(seed).save_pretrained(tmp_path)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    seed_of(load_predictor(tmp_path))


def test_whoever_waits_too_long_says_for_whom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file to be renamed is the weights: the new config lies beside the old weights."""
    for module in (files, saved):
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.2)
    of_seed(0).save_pretrained(tmp_path)
    with saving(tmp_path, "one", 2) as process:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        who = f"process {process.pid} on {os.uname().nodename}"
        assert writer_of(tmp_path, WEIGHTS) == who
        with pytest.raises(BlockingIOError, match=f"{who} is saving a predictor there") as raised:
            load_predictor(tmp_path)
        assert str(tmp_path) in str(raised.value)
        with pytest.raises(BlockingIOError, match=f"{who} has been writing it for 0 s; .*{tmp_path.name}/{WEIGHTS}"):
            of_seed(1).save_pretrained(tmp_path)
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert writer_of(tmp_path, WEIGHTS) is None
    with pytest.raises(ValueError, match="a save was cut short"):
        load_predictor(tmp_path)
    of_seed(1).save_pretrained(tmp_path)
    assert seed_of(load_predictor(tmp_path)) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "config.json", WEIGHTS}


def test_a_load_waits_for_the_end_of_a_save(tmp_path: Path) -> None:
    of_seed(0).save_pretrained(tmp_path)
    with saving(tmp_path, "one", 2) as process:
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        later = threading.Timer(0.3, process.send_signal, (signal.SIGCONT,))
        later.start()
        seed_of(load_predictor(tmp_path))
        later.join()


def test_a_first_save_that_is_cut_short_lacks_its_weights(tmp_path: Path) -> None:
    of_seed(0).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=f"must hold {WEIGHTS}"):
        load_predictor(tmp_path)


def test_what_is_read_is_of_the_file_that_was_opened(tmp_path: Path) -> None:
    """safetensors opens a file again for its tensors, by its name."""
    file = tmp_path / "file"
    save_file({"a": torch.zeros(3)}, file, {"of": "zeros"})
    with opened_tensors(file) as tensors:
        with replacing(file) as unfinished:
            save_file({"a": torch.ones(3)}, unfinished, {"of": "ones"})
        assert tensors.metadata() == {"of": "zeros"} and torch.equal(tensors.get_tensor("a"), torch.zeros(3))


def _official(folder: Path, seed: int) -> None:
    with replacing(folder / "file.pt") as file:
        torch.save({"model": small_predictor(seed).state_dict()}, file)


def _checkpoint(folder: Path, seed: int) -> None:
    Checkpoint({"seed": seed}, {"a": torch.full((1000,), float(seed))}, [float(seed)]).save(folder)


def _load_checkpoint(folder: Path) -> None:
    found = Checkpoint.load(folder)
    assert found is not None
    seed = float(found.settings["seed"])
    assert found.losses == [seed] and torch.equal(found.tensors["a"], torch.full((1000,), seed))


def _load_official(folder: Path) -> None:
    (found,) = load_official(folder / "file.pt").values()
    assert any(all(torch.equal(found.state_dict()[name], value) for name, value in state.items()) for state in STATES)


STATES = [small_predictor(seed).state_dict() for seed in (0, 1)]


@pytest.mark.parametrize(
    ("save", "load"), [(_official, _load_official), (_checkpoint, _load_checkpoint)], ids=["official", FILE]
)
def test_a_file_that_is_replaced_again_and_again(
    tmp_path: Path, save: Callable[[Path, int], None], load: Callable[[Path], None]
) -> None:
    save(tmp_path, 0)
    ended = threading.Event()

    def loop() -> None:
        while not ended.is_set():
            save(tmp_path, 1)
            save(tmp_path, 0)

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            load(tmp_path)
    finally:
        ended.set()
        thread.join()


def test_a_store_that_another_recording_has_replaced_is_refused(tmp_path: Path) -> None:
    store = FeatureStore.record(tmp_path, runs(2), model="one", progress=False)
    for file in tmp_path.glob("*.*"):
        file.unlink()
    FeatureStore.record(tmp_path, runs(2), model="two", progress=False)
    with pytest.raises(ValueError, match=r"run-000000\.safetensors: is of another recording: model is two, wanted one"):
        store.run([0], lambda call: call.blocks() and None)


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    with pytest.raises(ValueError, match="pipe: must be a regular file"), opened(tmp_path / "pipe"):
        pass


@pytest.mark.parametrize("name", [".model.safetensors.writer", ".model.safetensors.unfinished"])
def test_links_that_somebody_left_are_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    target = tmp_path / "kept" if name.endswith("unfinished") else tmp_path / "kept" / "file"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(target)
    with pytest.raises(OSError, match=r"cannot be written .*out/model\.safetensors"):
        of_seed(0).save_pretrained(tmp_path / "out")
    assert (tmp_path / "kept" / "file").read_text() == "mine"


def test_links_to_files_are_replaced(tmp_path: Path) -> None:
    of_seed(0).save_pretrained(tmp_path / "one")
    (tmp_path / "two").mkdir()
    for name in ("config.json", WEIGHTS):
        (tmp_path / "two" / name).symlink_to(tmp_path / "one" / name)
    assert seed_of(load_predictor(tmp_path / "two")) == 0
    of_seed(1).save_pretrained(tmp_path / "two")
    assert (seed_of(load_predictor(tmp_path / "one")), seed_of(load_predictor(tmp_path / "two"))) == (0, 1)


def test_where_there_are_no_locks_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="without locks: one process at a time"), only_writer(tmp_path, "file"):
        assert writer_of(tmp_path, "file") is None
    assert not list(tmp_path.iterdir())

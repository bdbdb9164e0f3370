"""A training that is stopped or killed anywhere goes on, and gives the bits of one that was not."""

from __future__ import annotations

import csv
import random
import signal
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_training import (
    SCHEDULE,
    SHORT,
    SIGMAS,
    Guided,
    Meddling,
    equal,
    files_in,
    runs,
    small_predictor,
    trajectories,
)
from torch import Tensor

from lesa_kernels import LesaPredictor, Schedule
from lesa_kernels.training import FeatureStore, RecordedSource, TrainingConfig, TrainingResult, train
from lesa_kernels.training.checkpoint import FILE, Checkpoint

pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")

WRITTEN = {FILE, "README.md", "config.json", "model.safetensors", "losses.csv", "loss.png"}
KILLED = Path(__file__).with_name("killed_training.py")


def whole(config: TrainingConfig = SHORT) -> tuple[LesaPredictor, TrainingResult]:
    predictor = small_predictor()
    return predictor, train(predictor, runs(), SCHEDULE, config, progress=False)


def stop(_: Tensor) -> Tensor:
    raise KeyboardInterrupt


@pytest.mark.parametrize("config", [SHORT, TrainingConfig(1, 1, shuffle=True, learning_rate=1e-3, decay_every=7)])
@pytest.mark.parametrize("at", [3, 20, 75, 110, 159])
def test_it_goes_on_with_the_same_bits(tmp_path: Path, config: TrainingConfig, at: int) -> None:
    want, want_result = whole(config)
    for calls in (at, 5):
        with pytest.raises(KeyboardInterrupt):
            train(small_predictor(), Meddling(runs(), calls, stop), SCHEDULE, config, out=tmp_path, progress=False)
    # Nothing depends on the weights that are handed in, once a batch is done.
    predictor = small_predictor(seed=0 if at < 20 else 5)
    result = train(predictor, runs(), SCHEDULE, config, out=tmp_path, progress=False)
    assert equal(predictor, want) and result.losses == want_result.losses and result.updates == want_result.updates
    assert files_in(tmp_path) == WRITTEN


def test_what_stops_it_leaves_the_last_complete_batch() -> None:
    config = TrainingConfig(1, 0)
    want, stopped = small_predictor(), small_predictor()
    train(want, runs(2), SCHEDULE, config, progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(stopped, Meddling(runs(4), 50, stop), SCHEDULE, config, progress=False)
    assert equal(stopped, want)


def test_a_finished_training_returns_its_result(tmp_path: Path) -> None:
    first, again = small_predictor(), small_predictor(5)
    result = train(first, runs(), SCHEDULE, SHORT, out=tmp_path, progress=False)

    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("nothing is to be run")

    second = train(again, Meddling(runs(), 0, refuse), SCHEDULE, SHORT, out=str(tmp_path), progress=False)
    assert equal(first, again) and second == result
    assert again.trained_sigmas == tuple(SIGMAS)


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    predictor = small_predictor()
    config = replace(SHORT, batch_size=2)
    result = train(predictor, runs(), SCHEDULE, config, out=tmp_path, progress=False)
    assert files_in(tmp_path) == WRITTEN
    loaded = LesaPredictor.from_pretrained(tmp_path)
    assert equal(loaded, predictor) and loaded.trained_sigmas == tuple(SIGMAS)
    with (tmp_path / "losses.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [float(row["loss"]) for row in rows] == [*result.losses["teacher forcing"], *result.losses["closed loop"]]
    assert [(row["phase"], row["epoch"], row["run"]) for row in rows] == [
        *(("teacher forcing", epoch, run) for epoch in "01" for run in ("0 1", "2 3")),
        ("closed loop", "0", "0 1"),
        ("closed loop", "0", "2 3"),
    ]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_branches_are_saved_apart(tmp_path: Path) -> None:
    both = {"cond": small_predictor(0), "uncond": small_predictor(1)}
    source = Guided(trajectories(1), trajectories(2)[1:])
    train(both, source, SCHEDULE, TrainingConfig(1, 0), out=tmp_path, progress=False)
    for branch, predictor in both.items():
        assert equal(LesaPredictor.from_pretrained(tmp_path / branch), predictor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": replace(SHORT, learning_rate=1.0)}, r"config\.learning_rate was 0\.01, now 1\.0; take another"),
        ({"source": runs(3)}, "the number of runs of source was 4, now 3"),
        (
            {"source": RecordedSource(trajectories(), [s**2 for s in SIGMAS])},
            r"sigmas\[1\] was 0\.95, now 0\.9025.* and 1",
        ),
        ({"schedule": Schedule.explicit(20, [0, 1, 2, 12])}, r"predictor\.cond\.full steps were 8 values, now 4"),
        ({"predictor": LesaPredictor(20, ((0.7, 2), (0.4, 3), (0.0, 3)), 8)}, "shapes.timestep.*was 16, now 8"),
        ({"predictor": LesaPredictor(20, ((0.6, 2), (0.4, 3), (0.0, 3)), 16)}, "stages.*was 0.7, now 0.6"),
    ],
)
def test_another_training_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arguments = {"predictor": small_predictor(), "source": runs(), "schedule": SCHEDULE, "config": SHORT}
    train(**arguments, out=tmp_path, progress=False)
    before = {file: (tmp_path / file).read_bytes() for file in WRITTEN}
    with pytest.raises(ValueError, match=message):
        train(**(arguments | change), out=tmp_path, progress=False)
    assert before == {file: (tmp_path / file).read_bytes() for file in WRITTEN}


def test_other_runs_of_as_many_are_refused(tmp_path: Path) -> None:
    class Named(RecordedSource):
        identity = "prompts of yesterday"

    source = Named(trajectories(2), SIGMAS)
    train(small_predictor(), source, SCHEDULE, SHORT, out=tmp_path / "out", progress=False)
    stored = FeatureStore.record(tmp_path / "store", source, model="small", progress=False)
    assert stored.identity == source.identity
    source.identity = "prompts of today"
    with pytest.raises(ValueError, match=r"source\.identity was prompts of yesterday, now prompts of today"):
        train(small_predictor(), source, SCHEDULE, SHORT, out=tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="identity is prompts of yesterday, wanted prompts of today"):
        FeatureStore.record(tmp_path / "store", source, model="small", progress=False)


def test_features_of_another_model_are_refused(tmp_path: Path) -> None:
    source, other = runs(1), runs(1)
    source.model, other.model = "one", "another"  # type: ignore[attr-defined]
    train(small_predictor(), source, SCHEDULE, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"source\.model was one, now another"):
        train(small_predictor(), other, SCHEDULE, out=tmp_path, progress=False)


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: str) -> None:
    train(small_predictor(), runs(1), SCHEDULE, TrainingConfig(1, 0), out=tmp_path, progress=False)
    file = tmp_path / FILE
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        save_file(load_file(file), file)
    with pytest.raises(ValueError, match=f"{FILE} must be the checkpoint of a training"):
        train(small_predictor(), runs(1), SCHEDULE, TrainingConfig(1, 0), out=tmp_path, progress=False)


def test_checkpoints_are_written_as_often_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, folder: [saved.append(len(self.losses)), save(self, folder)])
    for seconds, want in ((0.0, [1, 2, 3, 4, 4]), (1e6, [4])):
        saved.clear()
        out = tmp_path / str(seconds)
        train(small_predictor(), runs(), SCHEDULE, TrainingConfig(1, 0), out=out, progress=False, save_seconds=seconds)
        assert saved == want


def _after_kills(out: Path, kills: list[float | None], *arguments: str) -> tuple[dict[str, Tensor], int]:
    """Start a training again and again, kill it so many seconds after it began to write, or let it kill itself."""
    done = 0
    for wait in kills:
        process = subprocess.Popen([sys.executable, str(KILLED), str(out), *arguments])
        if wait is not None:
            began, checkpoint = time.monotonic(), out / FILE
            first = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            while process.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == first):
                assert time.monotonic() - began < 120, "no checkpoint came"
                time.sleep(0.002)
            time.sleep(wait)
            process.kill()
        done += process.wait(timeout=120) == -signal.SIGKILL
        if (out / "model.safetensors").exists():
            LesaPredictor.from_pretrained(out)
    subprocess.run([sys.executable, str(KILLED), str(out)], check=True, timeout=240)
    return load_file(out / FILE), done


def _check_killed(out: Path, kills: list[float | None], *arguments: str) -> None:
    tensors, done = _after_kills(out / "killed", kills, *arguments)
    assert done >= min(len(kills), 2), "it must be killed before it ends"
    subprocess.run([sys.executable, str(KILLED), str(out / "whole")], check=True, timeout=240)
    want = load_file(out / "whole" / FILE)
    assert tensors.keys() == want.keys() and all(torch.equal(tensors[name], want[name]) for name in want)
    assert files_in(out / "killed") == WRITTEN
    for file in ("model.safetensors", "config.json", "losses.csv"):
        assert (out / "killed" / file).read_bytes() == (out / "whole" / file).read_bytes()


@pytest.mark.exhaustive
def test_killed_at_random_moments(tmp_path: Path) -> None:
    _check_killed(tmp_path, [random.random() / 2 for _ in range(2)])


@pytest.mark.exhaustive
def test_killed_at_many_random_moments(tmp_path: Path) -> None:
    _check_killed(tmp_path, [random.random() / 2 for _ in range(12)])


@pytest.mark.exhaustive
@pytest.mark.parametrize("writes", range(1, 8))
def test_killed_before_a_file_takes_its_place(tmp_path: Path, writes: int) -> None:
    _check_killed(tmp_path, [None, None], str(writes))


def test_tensorboard_is_asked_for_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, int]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert folder == str(tmp_path / "tensorboard")
            written.append(("purge", purge_step))

        def add_scalar(self, name: str, value: float, index: int) -> None:
            written.append((name, index))

        def close(self) -> None:
            written.append(("close", 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    train(small_predictor(), runs(1), SCHEDULE, TrainingConfig(1, 1), out=tmp_path, progress=False, tensorboard=True)
    scalars = [("loss/teacher forcing", 0), ("learning rate", 0), ("loss/closed loop", 1), ("learning rate", 1)]
    assert written == [("purge", 0), *scalars, ("close", 0)]


def test_what_is_missing_is_named_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="tensorboard=True needs a folder"):
        train(small_predictor(), runs(1), SCHEDULE, tensorboard=True)
    for module, reason in (("matplotlib", "out needs"), ("tensorboard", "tensorboard=True needs")):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, module=module: None if name == module else name)
        with pytest.raises(ModuleNotFoundError, match=f"{reason} the package {module}: pip install {module}"):
            train(small_predictor(), runs(1), SCHEDULE, out=tmp_path, tensorboard=True)
    assert not files_in(tmp_path)

"""Saves and recordings that are killed again and again, at random moments: what is left, and what comes next."""

from __future__ import annotations

import collections
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from small_training import equal, runs

from lesa_kernels import LesaPredictor, load_predictor
from lesa_kernels.training import FeatureStore
from lesa_kernels.training.reports import save_predictors
from lesa_kernels.trajectories import ModelCall

KILLS = 100
LONGEST = 0.1


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServerContext]:
    """Makes processes that part from one that has imported torch already."""
    folders = [Path(__file__).parent, Path(__file__).parents[1] / "training", Path(__file__).parents[2]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed_savers"])
    yield context
    for process in multiprocessing.active_children():
        process.kill()


def killed(
    processes: ForkServerContext, target: Callable[[str, str], None], folder: Path, kind: str, seconds: float
) -> bool:
    """Run a process, and kill it so long after it began to write; whether it had not come to its end."""
    process = processes.Process(target=target, args=(str(folder), kind))
    before = _latest(folder)
    process.start()
    while process.is_alive() and _latest(folder) == before:
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def _latest(folder: Path) -> int:
    """Return when something in a folder was last made or removed."""
    return max((path.stat().st_mtime_ns for path in (folder, *folder.glob("*/"))), default=0) if folder.exists() else 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["one", "two"])
def test_a_killed_save_leaves_a_predictor_or_says_that_it_was_cut_short(
    tmp_path: Path, processes: ForkServerContext, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from killed_savers import save
    from saving_loop import of_seed

    moments, found = random.Random(), collections.Counter[str]()
    folders = [tmp_path] if kind == "one" else [tmp_path / "cond", tmp_path / "uncond"]
    save_predictors(dict.fromkeys(("cond", "uncond")[: len(folders)], of_seed(0)), tmp_path)
    for _ in range(KILLS):
        assert killed(processes, save, tmp_path, kind, moments.uniform(0, LONGEST))
        for folder in folders:
            try:
                loaded = load_predictor(folder)
            except ValueError as error:
                found[str(error).partition("(")[2].partition(",")[0]] += 1
                continue
            assert isinstance(loaded, LesaPredictor)
            assert any(equal(loaded, of_seed(seed)) for seed in (0, 1))
            found["whole"] += 1
        if moments.random() < 0.2:
            last = of_seed(1)
            save_predictors(dict.fromkeys(("cond", "uncond")[: len(folders)], last), tmp_path)
            assert all(equal(load_predictor(folder), last) for folder in folders)  # type: ignore[arg-type]
            assert not list(tmp_path.rglob(".*"))
    assert found.keys() <= {"whole", "a save was cut short"}
    with capsys.disabled():
        print(f"\n{KILLS} kills of saves of {kind}: {dict(found)}")


@pytest.mark.exhaustive
def test_a_killed_recording_goes_on(
    tmp_path: Path, processes: ForkServerContext, capsys: pytest.CaptureFixture[str]
) -> None:
    from killed_savers import record

    moments, kills, recordings = random.Random(), 0, 0
    while kills < KILLS:
        folder = tmp_path / str(recordings)
        while killed(processes, record, folder, "small", moments.uniform(0, LONGEST)):
            kills += 1
        store, want = FeatureStore(folder, model="small"), runs(40)
        for run in range(len(want)):
            features: list[list[torch.Tensor]] = [[], []]
            for source, into in ((store, features[0]), (want, features[1])):

                def policy(call: ModelCall, into: list[torch.Tensor] = into) -> None:
                    into.append(call.blocks().clone())

                source.run([run], policy)
            assert all(torch.equal(a, b) for a, b in zip(*features, strict=True))
        # Of a run that was killed after its file had taken its place.
        assert {path.name for path in folder.glob(".*")} - {".lock"} <= {
            f".run-{run:06d}.safetensors.{left}" for run in range(len(want)) for left in ("writer", "unfinished")
        }
        recordings += 1
    with capsys.disabled():
        print(f"\n{kills} kills in {recordings} recordings of 40 runs, all whole in the end")

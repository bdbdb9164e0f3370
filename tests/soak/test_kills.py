"""A training that is killed again and again, at moments drawn at random: what it leaves, and what comes out of it."""

from __future__ import annotations

import collections
import contextlib
import csv
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lesa_kernels import LesaPredictor, load_predictor
from lesa_kernels.files import read_json
from lesa_kernels.training.checkpoint import FILE, Checkpoint

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed (extra: demo)")

KILLS = 200
# A batch and all that is saved after it are some 20 steps, of which some take a millisecond and one takes a second.
MOST_STEPS, LONGEST = 60, 0.02
SAME = ("model.safetensors", "config.json", "losses.csv")


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> ForkServerContext:
    """Makes processes that part from one that has imported torch already."""
    folders = [Path(__file__).parent, Path(__file__).parents[1] / "training", Path(__file__).parents[2]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    for folder in folders:
        monkeypatch.syspath_prepend(folder)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["told_training"])
    return context


def live(processes: ForkServerContext, out: Path, steps: int | None, seconds: float = 0) -> tuple[bool, str]:
    """Start or go on with the training, and kill it so long after it began its so-manieth step.

    Returns:
        Whether it was killed, and what it said last.
    """
    from told_training import main

    ear, mouth = processes.Pipe(duplex=False)
    process = processes.Process(target=main, args=(str(out), mouth))
    process.start()
    mouth.close()
    said = []
    with ear, contextlib.suppress(EOFError):
        while True:
            said.append(ear.recv_bytes().decode())
            if len(said) == steps:
                time.sleep(seconds)
                process.kill()
    process.join()
    code = process.exitcode
    process.close()
    assert code in (0, -signal.SIGKILL), said[-3:]
    return code != 0, said[-1]


def read_all(out: Path) -> int:
    """Load every file of a training's folder; returns how many batches it has done."""
    files = {path.name for path in out.iterdir() if not path.name.startswith(".")}
    assert files <= {FILE, "README.md", "losses.csv", "loss.png", *SAME}, files
    hidden = {path.name for path in out.iterdir()} - files
    assert all(name == ".lock" or name.endswith((".unfinished", ".writer")) for name in hidden), hidden
    if "config.json" in files:
        assert read_json(out / "config.json")["num_steps"] == 20
    if "model.safetensors" in files:
        assert isinstance(load_predictor(out), LesaPredictor)
    if "README.md" in files:
        assert (out / "README.md").read_text(encoding="utf-8").startswith("---")
    if "losses.csv" in files:
        with (out / "losses.csv").open(newline="", encoding="utf-8") as text:
            assert all(float(row["loss"]) > 0 for row in csv.DictReader(text))
    if "loss.png" in files:
        with Image.open(out / "loss.png") as image:
            image.load()
    found = Checkpoint.load(out)
    return 0 if found is None else len(found.losses)


@pytest.mark.exhaustive
def test_killed_at_random_moments_it_gives_the_same_bits(
    tmp_path: Path, processes: ForkServerContext, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = random.randrange(2**32)
    moments = random.Random(seed)
    whole = tmp_path / "whole"
    assert not live(processes, whole, None)[0]
    want, batches = load_file(whole / FILE), read_all(whole)
    phases: collections.Counter[str] = collections.Counter()
    trainings = files = 0
    while phases.total() < KILLS:
        out, killed, done = tmp_path / f"killed-{trainings}", True, 0
        while killed:
            enough = phases.total() >= KILLS
            steps, seconds = moments.randint(1, MOST_STEPS), moments.uniform(0, LONGEST)
            killed, phase = live(processes, out, None if enough else steps, seconds)
            phases.update([phase] * killed)
            if out.exists():
                before, done = done, read_all(out)
                assert done >= before, "a batch was lost"
                files += sum(path.is_file() for path in out.iterdir())
        assert done == batches
        tensors = load_file(out / FILE)
        assert tensors.keys() == want.keys() and all(torch.equal(tensors[name], want[name]) for name in want)
        for name in SAME:
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name
        trainings += 1
    with capsys.disabled():
        print(
            f"\n{phases.total()} kills (seed {seed}) in {trainings} trainings of {batches} batches; while "
            + ", ".join(f"{phase}: {count}" for phase, count in phases.most_common())
            + f"\nafter each kill every file was loaded, {files} in all; at the end of each training {len(want)} "
            f"tensors and {len(SAME)} files had the bits of the training that was not killed"
        )

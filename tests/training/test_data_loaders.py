"""Workers of torch's DataLoader that read a store and run predictors return what the process itself gets."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from recorded_data import Recorded
from small_training import runs, small_predictor
from torch.utils.data import DataLoader

from lesa_kernels.training import FeatureStore


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.exhaustive)])
def test_workers_return_what_the_process_gets(tmp_path: Path, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [Path(__file__).parent, Path(__file__).parents[2]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    store = FeatureStore.record(tmp_path, runs(4), model="small", progress=False)
    data = Recorded(store, small_predictor())
    want = torch.stack([data[run] for run in range(len(data))])
    loader = DataLoader(data, num_workers=1, multiprocessing_context=start, timeout=120)
    assert torch.equal(torch.cat(list(loader)), want)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_worker_may_be_forked_while_a_thread_saves(tmp_path: Path) -> None:
    """It holds a copy of the lock's descriptor, and outlives the save."""
    reading, writing = os.pipe()
    ended = threading.Event()

    def save() -> None:
        while not ended.is_set():
            small_predictor().save_pretrained(tmp_path)

    thread = threading.Thread(target=save)
    thread.start()
    children = []
    for _ in range(8):
        if (child := os.fork()) == 0:
            os.read(reading, 1)
            os._exit(0)
        children.append(child)
    ended.set()
    thread.join()
    small_predictor(1).save_pretrained(tmp_path)
    os.write(writing, b"." * len(children))
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []

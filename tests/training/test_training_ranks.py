"""Several processes train what one process trains on the same batches."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from small_training import SCHEDULE, SIGMAS, Meddling, equal, files_in, runs, small_predictor, trajectories
from torch import Tensor

from lesa_kernels import LesaPredictor
from lesa_kernels.training import FeatureStore, RecordedSource, TrainingConfig, train

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")

CONFIG = TrainingConfig(1, 1, learning_rate=1e-3, batch_size=2, shuffle=True)


Work: TypeAlias = "Callable[[Path], dict[str, Any]]"


def training_rank(folder: Path) -> dict[str, Any]:
    """Train with weights of one's own: those of rank 0 must be taken."""
    predictor = small_predictor(seed=dist.get_rank())
    messages = 0
    all_reduce = dist.all_reduce

    def counted(*arguments: Any) -> Any:
        nonlocal messages
        messages += 1
        return all_reduce(*arguments)

    dist.all_reduce = counted
    result = train(predictor, runs(4), SCHEDULE, CONFIG, out=folder, progress=False)
    dist.all_reduce = all_reduce
    return {"state": predictor.state_dict(), "losses": result.losses, "messages": messages, "updates": result.updates}


def resumed_rank(folder: Path) -> dict[str, Any]:
    """Stop in the third of four batches, in all ranks, and go on."""

    def stop(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    try:
        train(small_predictor(), Meddling(runs(4), 50, stop), SCHEDULE, CONFIG, out=folder, progress=False)
    except KeyboardInterrupt:
        # The writer may still be writing what the others are about to ask for.
        dist.barrier()
        return training_rank(folder)
    raise AssertionError("it was not stopped")


def bad_rank(folder: Path) -> dict[str, Any]:
    """Meet a feature that is not finite on one rank."""
    paths = trajectories(4)
    paths[3][9] = paths[3][9] * torch.nan
    predictor = small_predictor()
    config = TrainingConfig(1, 1, batch_size=2)
    try:
        train(predictor, RecordedSource(paths, SIGMAS), SCHEDULE, config, out=folder, progress=False)
    except FloatingPointError as error:
        return {"error": str(error), "state": predictor.state_dict()}
    raise AssertionError("it was not stopped")


def refused_rank(folder: Path) -> dict[str, Any]:
    """Ask for what cannot be done; all ranks must hear of it."""
    train(small_predictor(), runs(2), SCHEDULE, CONFIG, out=folder, progress=False)
    heard = []
    for count, config, out in ((4, TrainingConfig(), None), (3, CONFIG, None), (4, CONFIG, folder)):
        try:
            train(small_predictor(), runs(count), SCHEDULE, config, out=out, progress=False)
        except ValueError as error:
            heard.append(str(error))
    return {"heard": heard}


def recording_rank(folder: Path) -> dict[str, Any]:
    """Record a store together."""
    store = FeatureStore.record(folder, runs(3), model="small", progress=False)
    return {"runs": len(store)}


def late_recording_rank(folder: Path) -> dict[str, Any]:
    """Record a store together, of which one process has done its share before the other begins."""
    if dist.get_rank() == 1:
        time.sleep(1.0)
    return {"runs": len(FeatureStore.record(folder, runs(4), model="small", progress=False))}


WORKS: tuple[Work, ...] = (training_rank, resumed_rank, bad_rank, refused_rank, recording_rank, late_recording_rank)


def _rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save({work.__name__: work(folder / work.__name__) for work in WORKS}, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks did all their work: processes are slow to start."""
    folder = tmp_path_factory.mktemp("ranks")
    processes.spawn(_rank, (folder,), nprocs=2)
    return folder


def done(folder: Path, work: Work) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt")[work.__name__] for rank in range(2)]


def _close(state: dict[str, Tensor], want: LesaPredictor) -> bool:
    before = small_predictor().state_dict()
    return all(
        (state[name] - tensor).norm() <= 0.02 * (tensor - before[name]).norm() + 1e-7
        for name, tensor in want.state_dict().items()
    )


def test_two_ranks_train_what_one_trains(folder: Path) -> None:
    want = small_predictor()
    alone = train(want, runs(4), SCHEDULE, CONFIG, progress=False)
    first, second = done(folder, training_rank)
    assert all(torch.equal(first["state"][name], tensor) for name, tensor in second["state"].items())
    assert _close(first["state"], want)
    assert first["losses"] == second["losses"] and first["updates"] == alone.updates
    for phase, values in alone.losses.items():
        assert first["losses"][phase] == pytest.approx(values, rel=1e-4)
    assert first["messages"] == alone.updates + 4, "one message an update, and one a batch for its loss"
    out = folder / "training_rank"
    assert "checkpoint.safetensors" in files_in(out) and _close(LesaPredictor.from_pretrained(out).state_dict(), want)


def test_two_ranks_go_on(folder: Path) -> None:
    whole = done(folder, training_rank)[0]
    for rank in done(folder, resumed_rank):
        assert 0 < rank["messages"] < whole["messages"] and rank["losses"] == whole["losses"]
        assert all(torch.equal(rank["state"][name], tensor) for name, tensor in whole["state"].items())


def test_a_bad_value_on_one_rank_stops_all(folder: Path) -> None:
    want = small_predictor()
    train(want, runs(2), SCHEDULE, TrainingConfig(1, 0, batch_size=2), progress=False)
    for rank in done(folder, bad_rank):
        assert "the target is not finite at step 9" in rank["error"]
        assert "(teacher forcing phase, epoch 0, run 2 3)" in rank["error"]
        assert _close(rank["state"], want)
    assert _close(LesaPredictor.from_pretrained(folder / "bad_rank").state_dict(), want)


def test_what_is_refused_is_refused_on_all_ranks(folder: Path) -> None:
    for rank in done(folder, refused_rank):
        batch, count, other = rank["heard"]
        assert "config.batch_size must be a multiple of the 2 processes, got 1" in batch
        assert "the number of runs of source must be a multiple of the 2 processes, got 3" in count
        assert "the number of runs of source was 2, now 4" in other


def test_ranks_record_together(folder: Path) -> None:
    assert [rank["runs"] for rank in done(folder, recording_rank)] == [3, 3]
    alone, together = small_predictor(), small_predictor()
    train(alone, runs(3), SCHEDULE, progress=False)
    train(together, FeatureStore(folder / "recording_rank"), SCHEDULE, progress=False)
    assert equal(alone, together)


def test_a_process_that_is_late_records_its_own_share(folder: Path) -> None:
    assert [rank["runs"] for rank in done(folder, late_recording_rank)] == [4, 4]


def test_processes_that_do_not_know_each_other_are_refused() -> None:
    code = (
        "from small_training import *; from lesa_kernels.training import train\n"
        "train(small_predictor(), runs(), SCHEDULE, progress=False)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 1 and "call torch.distributed.init_process_group() first" in found.stderr

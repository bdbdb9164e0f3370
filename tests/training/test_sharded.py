"""FSDP and DTensor: a predictor whose parameters are spread learns as a whole one; spread features are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from small_training import SCHEDULE, SIGMAS, runs, small_predictor
from torch import Tensor, nn

import lesa_kernels as lesa
from lesa_kernels.ops import OPS
from lesa_kernels.training import TrainingConfig, train

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)
LEVEL = 0.3


def _learned(predictor: nn.Module, history: list[Tensor]) -> list[Tensor]:
    """Losses of some updates."""
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = (predictor(history, SIGMAS, LEVEL) - 1).abs().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def _refusal(call: Any, *arguments: Any) -> str:
    with pytest.raises((TypeError, RuntimeError, NotImplementedError)) as caught:
        call(*arguments)
    return f"{caught.type.__name__}: {caught.value}"


def _fully_sharded() -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(0)
    whole, history = small_predictor(), [torch.randn(2, 3) for _ in range(8)]
    sharded = copy.deepcopy(whole)
    fully_shard(sharded)  # type: ignore[operator]
    losses = _learned(sharded, history)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    torch.testing.assert_close(losses, _learned(whole, history))
    for (name, spread), parameter in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(spread.full_tensor(), parameter.detach(), msg=name)  # type: ignore[attr-defined]
    refusals = {"plan": _refusal(sharded.plan, SIGMAS, SCHEDULE)}
    refusals["train"] = _refusal(
        lambda: train(sharded, runs(4), SCHEDULE, TrainingConfig(1, 1, batch_size=2), progress=False)
    )
    sharded.unshard()  # type: ignore[attr-defined]
    assert sharded.plan(SIGMAS, SCHEDULE) == whole.plan(SIGMAS, SCHEDULE)
    return refusals


def _spread_features() -> dict[str, Any]:
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", [0, 1])

    def spread(value: Any) -> Any:
        if isinstance(value, list):
            return [spread(each) for each in value]
        return distribute_tensor(value, mesh, [Replicate()]) if isinstance(value, Tensor) else value

    refusals = {}
    for name, op in OPS.items():
        arguments = op.example(lambda *shape: torch.randn(shape), (4, 6))
        refusals[name] = _refusal(getattr(torch.ops.lesa, name), *map(spread, arguments))
        refusals[f"{name}, the first alone"] = _refusal(
            getattr(torch.ops.lesa, name), spread(arguments[0]), *arguments[1:]
        )
    feature = distribute_tensor(torch.randn(4, 6), mesh, [Shard(0)])
    session = lesa.Session(lesa.TaylorSeer().plan(SIGMAS, SCHEDULE))
    refusals["Session"] = _refusal(session.push, 0, feature)
    session.push(0, feature.to_local())
    refusals["LesaPredictor"] = _refusal(small_predictor(), [feature] * 8, SIGMAS, LEVEL)
    return refusals


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(_fully_sharded() | _spread_features(), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.exhaustive
def test_what_is_spread_over_processes_is_right_or_refused(tmp_path: Path) -> None:
    processes.spawn(_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        refusals = torch.load(tmp_path / f"{rank}.pt")
        assert len(refusals) == 2 * len(OPS) + 4
        for name, words in refusals.items():
            assert "DTensor" in words or "sharding" in words, f"{name}: {words}"
        for name in ("Session", "LesaPredictor"):
            assert refusals[name].startswith("TypeError: lesa::p") and "to_local()" in refusals[name], refusals[name]

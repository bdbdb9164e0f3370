"""Several processes: each forecasts what it holds, from the same plan, so they neither talk nor drift apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from diffusers import ContextParallelConfig, FluxTransformer2DModel
from instruction_set import follow_torch
from tiny_flux import CHANNELS, call_arguments, tiny_transformer, watching
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lesa_kernels import Schedule, TaylorSeer
from lesa_kernels.integrations import enable, summary

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)

STEPS = 8
FULL = (0, 2, 5)
SPARSE = Schedule.explicit(STEPS, FULL)
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
TOKENS = 6
# Each rank gets as many text tokens as the others.
TEXT_TOKENS = 4


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Sum in the same order here as in the ranks."""


class Collectives(TorchDispatchMode):
    """Counts messages between processes."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in ("_c10d_functional", "c10d") and not func.__name__.startswith(("wait", "_wrap")):
            self.count += 1
        return func(*args, **(kwargs or {}))


def arguments(latents: Tensor, sigma: float, prompt: int = 0) -> dict[str, Any]:
    text = torch.randn(1, TEXT_TOKENS, 8, generator=torch.Generator().manual_seed(prompt))
    return call_arguments(latents, sigma, prompt) | {
        "encoder_hidden_states": text,
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "return_dict": False,
    }


@torch.no_grad()
def sample(velocity: Callable[[Tensor, int], Tensor]) -> Tensor:
    latents = torch.randn(1, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
    for step in range(STEPS):
        latents = latents + (SIGMAS[step + 1] - SIGMAS[step]) * velocity(latents, step)
    return latents


def enabled_transformer() -> FluxTransformer2DModel:
    model = tiny_transformer()
    enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    return model


def guided(cond: Tensor, uncond: Tensor) -> Tensor:
    return uncond + 3 * (cond - uncond)


def branch(model: FluxTransformer2DModel, number: int, latents: Tensor, step: int) -> Tensor:
    with model.cache_context(("cond", "uncond")[number]):
        output: Tensor = model(**arguments(latents, SIGMAS[step], prompt=number))[0]
    return output


def sequence_rank(enable_first: bool) -> dict[str, Any]:
    """Sample with the tokens of each feature split over the ranks, by diffusers' own context parallelism."""
    # diffusers numbers accelerators, of which there are none here.
    torch.accelerator.device_count = lambda: 1
    model = enabled_transformer() if enable_first else tiny_transformer()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    if not enable_first:
        enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    messages = []

    def velocity(latents: Tensor, step: int) -> Tensor:
        with Collectives() as collectives:
            output: Tensor = model(**arguments(latents, SIGMAS[step]))[0].clone()
        messages.append(collectives.count)
        return output

    with watching(model) as watch:
        latents = sample(velocity)
    shapes = {tuple(feature.shape) for feature in watch.features}
    return {"latents": latents, "messages": messages, "blocks": watch.blocks, "shapes": shapes}


def guidance_rank() -> dict[str, Any]:
    """Sample with one branch of the guidance on each rank."""
    model, rank = enabled_transformer(), dist.get_rank()

    def velocity(latents: Tensor, step: int) -> Tensor:
        with Collectives() as collectives:
            own = branch(model, rank, latents, step)
        assert collectives.count == 0
        both = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(both, own)
        return guided(*both)

    latents = sample(velocity)
    return {"latents": latents, "forecasts": summary(model).forecast}


def _rank(rank: int, folder: str, work: Callable[..., dict[str, Any]], options: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    follow_torch()
    warnings.simplefilter("error")
    # diffusers calls torch by names that are going out of use.
    warnings.filterwarnings("ignore", category=FutureWarning)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(work(*options), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def two_ranks(folder: Path, work: Callable[..., dict[str, Any]], *options: Any) -> list[dict[str, Any]]:
    processes.spawn(_rank, (str(folder), work, options), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("enable_first", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_each_rank_forecasts_its_own_tokens(tmp_path: Path, enable_first: bool) -> None:
    model = enabled_transformer()
    with watching(model) as watch:
        alone = sample(lambda latents, step: model(**arguments(latents, SIGMAS[step]))[0])
    ranks = two_ranks(tmp_path, sequence_rank, enable_first)
    assert torch.equal(ranks[0]["latents"], ranks[1]["latents"])
    torch.testing.assert_close(ranks[0]["latents"], alone, rtol=1e-4, atol=1e-5)
    for rank in ranks:
        assert rank["blocks"] == watch.blocks
        assert rank["shapes"] == {(1, TOKENS // 2, watch.features[0].shape[-1])}
        # What is left on a forecast step is diffusers' own: it puts the output together.
        assert {rank["messages"][step] for step in range(STEPS) if step not in FULL} == {1}
        assert min(rank["messages"][step] for step in FULL) > 1


def test_each_rank_may_take_a_branch_of_the_guidance(tmp_path: Path) -> None:
    model = enabled_transformer()
    alone = sample(lambda latents, step: guided(*(branch(model, number, latents, step) for number in range(2))))
    ranks = two_ranks(tmp_path, guidance_rank)
    for rank in ranks:
        assert torch.equal(rank["latents"], alone)
        assert rank["forecasts"] == STEPS - len(FULL)

"""Two threads: on one model each call is answered whole before the next begins; a predictor may be shared."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: diffusers)")

from tiny_flux import call_arguments, tiny_pipeline, tiny_transformer

import lesa_kernels as lesa

STEPS = 10
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]


@torch.no_grad()
@pytest.mark.parametrize("history_dtype", [None, torch.bfloat16], ids=str)
def test_a_call_of_another_thread_does_not_get_this_threads_forecast(history_dtype: torch.dtype | None) -> None:
    model = tiny_transformer()
    latents, others = torch.randn(2, 1, 6, 4)
    other_call = call_arguments(others, 0.3, 1)
    plain = model(**other_call).sample
    schedule = lesa.Schedule.explicit(STEPS, (0, 1, 5))
    lesa.enable(model, lesa.Reuse(), schedule, sigmas=SIGMAS, history_dtype=history_dtype)
    in_tail, answered = threading.Event(), threading.Event()
    first = threading.get_ident()
    results: list[Tensor] = []
    holding = False

    def hold(module: Any, args: Any) -> None:
        if holding and threading.get_ident() == first:
            in_tail.set()
            # The other thread has to wait for its turn, so this runs out where all is well.
            answered.wait(0.5)

    def other() -> None:
        in_tail.wait(20)
        with (
            torch.no_grad(),
            pytest.warns(lesa.LesaWarning, match="it comes from another thread than the run at step 2"),
        ):
            results.append(model(**other_call).sample)
        answered.set()

    handle = model.proj_out.register_forward_pre_hook(hold)
    thread = threading.Thread(target=other)
    thread.start()
    conditions = call_arguments(latents, 1.0)
    for step in range(3):
        holding = step == 2
        with model.cache_context("cond", step_index=step):
            model(**conditions | {"timestep": torch.tensor([SIGMAS[step]])})
    thread.join(20)
    handle.remove()
    assert torch.allclose(results[0], plain, atol=1e-4)


def test_two_pipelines_share_a_predictor_in_two_threads() -> None:
    torch.manual_seed(0)
    predictor = lesa.LesaPredictor(STEPS)
    schedule = lesa.Schedule.explicit(STEPS, (0, 1, 5))
    pipes = [tiny_pipeline() for _ in range(2)]
    for pipe in pipes:
        lesa.enable(pipe, predictor, schedule)
    alone = [pipe(STEPS, seed=seed) for seed, pipe in enumerate(pipes)]
    both = threading.Barrier(2)

    def sample(seed: int) -> list[Tensor]:
        lesa.enable(pipes[seed], predictor, schedule)
        both.wait(20)
        return [pipes[seed](STEPS, seed=seed) for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        for seed, results in enumerate(pool.map(sample, range(2))):
            assert all(torch.equal(result, alone[seed]) for result in results)
            assert lesa.summary(pipes[seed]).forecast > 0

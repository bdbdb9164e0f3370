"""Two threads on one model: each call is answered whole before the next begins."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: diffusers)")

from tiny_flux import call_arguments, tiny_transformer

import lesa_kernels as lesa
from lesa_kernels.integrations.bypass import _Turn

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
        with torch.no_grad():
            results.append(model(**other_call).sample)
        answered.set()

    handle = model.proj_out.register_forward_pre_hook(hold)
    thread = threading.Thread(target=other)
    thread.start()
    for step in range(3):
        holding = step == 2
        with model.cache_context("cond", step_index=step):
            model(**call_arguments(latents, SIGMAS[step]))
    thread.join(20)
    handle.remove()
    assert torch.allclose(results[0], plain, atol=1e-4)


def test_a_turn_copies_and_pickles_as_one_of_its_own() -> None:
    turn = _Turn()
    with turn:
        for other in (copy.deepcopy(turn), pickle.loads(pickle.dumps(turn))):
            taken = threading.Thread(target=other.__enter__)
            taken.start()
            taken.join(5)
            assert not taken.is_alive()

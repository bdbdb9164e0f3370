"""The tail of a cached step in a CUDA graph: it waits for nothing, and a replay sees the forecast of its step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from tiny_flux import call_arguments, tiny_transformer
from torch import Tensor

from lesa_kernels import Schedule, Session, TaylorSeer
from lesa_kernels.integrations.models import flux_tail


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_a_captured_tail_follows_the_forecasts() -> None:
    sigmas = [1 - step / 8 for step in range(9)]
    model = tiny_transformer().to("cuda")
    latents = torch.randn(1, 16, 4, device="cuda")
    arguments = {
        name: value.to("cuda") if isinstance(value, Tensor) else value
        for name, value in call_arguments(latents, sigmas[0]).items()
    }
    tail = partial(flux_tail, model, return_dict=False, **arguments)
    session = Session(TaylorSeer(order=1).plan(sigmas, Schedule(8, (0, 1, 4))))
    held = torch.empty(1, 16, 32, device="cuda")
    with torch.inference_mode():
        for step in (0, 1):
            session.push(step, torch.randn_like(held))
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            tail(held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            (output,) = tail(held)
        for step in (2, 3):
            held.copy_(session.forecast(step))
            graph.replay()
            (want,) = tail(session.forecast(step))
            # A captured product of matrices may take another algorithm than an eager one.
            torch.testing.assert_close(output, want, rtol=1e-4, atol=1e-5)

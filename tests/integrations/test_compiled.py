"""torch.compile of the blocks and of the whole model, with the hooks on."""

from __future__ import annotations

import pytest
import torch
from tiny_flux import (
    NUM_BLOCKS,
    TinyPipeline,
    watching,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lesa_kernels import Schedule, TaylorSeer
from lesa_kernels.integrations import disable, enable, summary

STEPS = 10
FULL = (0, 1, 5)
SPARSE = Schedule.explicit(STEPS, FULL)


def test_compiled_blocks_keep_whole_graphs(pipe: TinyPipeline) -> None:
    """Regional compilation: the hooks break no graph of a block and add no recompilation."""
    enable(pipe, TaylorSeer(), SPARSE)
    expected = pipe(STEPS)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
    torch.testing.assert_close(pipe(STEPS), expected)
    first = len(graphs)
    pipe(STEPS)
    assert first == len(graphs)
    # One graph for each kind of block.
    assert first == 2
    with watching(pipe.transformer) as watch:
        pipe(STEPS)
    assert watch.blocks == len(FULL) * NUM_BLOCKS


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_compiled_once_for_each_kind_of_step(pipe: TinyPipeline, in_place: bool) -> None:
    enable(pipe, TaylorSeer(), SPARSE)
    expected = pipe(STEPS)
    torch._dynamo.reset()
    counter = CompileCounter()
    if in_place:
        pipe.transformer.compile(backend=counter)
    else:
        disable(pipe)
        pipe.transformer = torch.compile(pipe.transformer, backend=counter)
        enable(pipe, TaylorSeer(), SPARSE)
    torch.testing.assert_close(pipe(STEPS), expected)
    frames = counter.frame_count
    assert frames > 0
    pipe(STEPS, seed=1)
    assert counter.frame_count == frames
    assert (summary(pipe).full, summary(pipe).forecast) == (len(FULL), STEPS - len(FULL))

"""torch.compile of the blocks and of the whole model, with the hooks on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_flux import NUM_BLOCKS, TinyPipeline, watching
from tiny_models import MODELS, at_step, sample_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lesa_kernels import Schedule, TaylorSeer
from lesa_kernels.integrations import disable, enable, enabled, summary

STEPS = 10
FULL = (0, 1, 5)
SPARSE = Schedule.explicit(STEPS, FULL)
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]

# It branches on a tensor's value, with the hooks or without.
NOT_ONE_GRAPH = {"hunyuan15"}
# Entries of their own, and a structure that is found.
ONE_OF_A_KIND = {"flux", "qwen", "hunyuan", "wan"}
REGIONAL = ["qwen", "hunyuan", "wan", "flux2", "ltx", "z_image", "hunyuan15"]


class Graphs:
    """A backend that keeps the graphs and runs them as they are."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        self.count += 1
        return graph


@torch.no_grad()
def sample(model: nn.Module, name: str) -> list[Tensor]:
    return [sample_of(model(**at_step(MODELS[name], step, SIGMAS[step]))) for step in range(STEPS)]


def accelerated(model: nn.Module, name: str, **options: Any) -> list[Tensor]:
    """What the model gives with hooks and without a compiler."""
    with enabled(model, TaylorSeer(), SPARSE, sigmas=SIGMAS, **options):
        return sample(model, name)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ONE_OF_A_KIND else pytest.mark.exhaustive)
        for name in MODELS
        if name not in NOT_ONE_GRAPH
    ],
)
def test_a_model_compiled_in_place_is_one_graph_for_each_kind_of_step(name: str) -> None:
    """fullgraph=True: a graph break would be an error. Each forecast lies in another slot of the history."""
    torch._dynamo.reset()
    model = MODELS[name].model()
    plain, expected = sample(model, name), accelerated(model, name)
    graphs = Graphs()
    model.compile(fullgraph=True, backend=graphs)
    compiled_call = model._compiled_call_impl
    enable(model, TaylorSeer(), SPARSE, sigmas=SIGMAS)
    torch.testing.assert_close(sample(model, name), expected)
    assert graphs.count == 2
    sample(model, name)
    assert graphs.count == 2
    assert (summary(model).full, summary(model).forecast) == (len(FULL), STEPS - len(FULL))
    disable(model)
    assert model._compiled_call_impl is compiled_call
    torch.testing.assert_close(sample(model, name), plain)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("flux", {}),
        ("flux", {"history_dtype": torch.bfloat16}),
        ("flux", {"history_dtype": torch.bfloat16, "chunk": 1}),
        ("wan", {}),
    ],
)
def test_a_wrapped_model_is_one_graph_for_each_kind_of_step(name: str, options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model = MODELS[name].model()
    plain, expected = sample(model, name), accelerated(model, name, **options)
    graphs = Graphs()
    wrapper = torch.compile(model, fullgraph=True, backend=graphs)
    with enabled(wrapper, TaylorSeer(), SPARSE, sigmas=SIGMAS, **options):
        torch.testing.assert_close(sample(wrapper, name), expected)
        assert graphs.count == 2
        sample(wrapper, name)
        assert graphs.count == 2
        assert (summary(wrapper).full, summary(wrapper).forecast) == (len(FULL), STEPS - len(FULL))
    torch.testing.assert_close(sample(wrapper, name), plain)


def test_a_model_that_ran_compiled_can_be_enabled_and_disabled() -> None:
    torch._dynamo.reset()
    model = MODELS["wan"].model()
    expected = accelerated(model, "wan")
    graphs = Graphs()
    model.compile(fullgraph=True, backend=graphs)
    plain = sample(model, "wan")
    for _ in range(2):
        enable(model, TaylorSeer(), SPARSE, sigmas=SIGMAS)
        torch.testing.assert_close(sample(model, "wan"), expected)
        disable(model)
        torch.testing.assert_close(sample(model, "wan"), plain)


@pytest.mark.parametrize("name", ["flux", "qwen", "sd3"])
def test_a_model_that_is_compiled_later_breaks_where_it_is_decided_alone(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = MODELS[name].model()
    expected = accelerated(model, name)
    enable(model, TaylorSeer(), SPARSE, sigmas=SIGMAS)
    graphs = Graphs()
    model.compile(backend=graphs)
    torch.testing.assert_close(sample(model, name), expected)
    assert graphs.count == 2
    assert [reason.splitlines()[0] for reason in torch._dynamo.utils.counters["graph_break"]] == [
        "Skip inlining `torch.compiler.disable()`d function"
    ]


@pytest.mark.parametrize("name", REGIONAL)
def test_blocks_that_are_compiled_keep_their_graphs(name: str) -> None:
    torch._dynamo.reset()
    model = MODELS[name].model()
    expected, graphs = accelerated(model, name), Graphs()
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    sample(model, name)
    plain = graphs.count
    assert plain > 0
    enable(model, TaylorSeer(), SPARSE, sigmas=SIGMAS)
    torch.testing.assert_close(sample(model, name), expected)
    assert graphs.count == plain
    assert (summary(model).full, summary(model).forecast) == (len(FULL), STEPS - len(FULL))


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

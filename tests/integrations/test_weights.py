"""Weights that are not as the model was made: LoRA that comes and goes, integers in place of floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_flux import NUM_BLOCKS, TinyPipeline, add_lora, tiny_pipeline, watching
from torch import Tensor, nn

from lesa_kernels import Reuse, Schedule, TaylorSeer
from lesa_kernels.integrations import disable, enable, summary

STEPS = 10
FULL = (0, 1, 5)
SPARSE = Schedule.explicit(STEPS, FULL)
ALL = Schedule.explicit(STEPS, range(STEPS))


@pytest.mark.parametrize("lora_first", [True, False])
def test_lora_counts_in_full_steps_and_tails(pipe: TinyPipeline, lora_first: bool) -> None:
    plain = pipe(STEPS)
    if not lora_first:
        enable(pipe, TaylorSeer(1), SPARSE)
        without = pipe(STEPS)
    add_lora(pipe, "style")
    if lora_first:
        tuned = pipe(STEPS)
        assert not torch.equal(tuned, plain)
        enable(pipe, Reuse(), ALL)
        assert torch.equal(pipe(STEPS), tuned)
        enable(pipe, TaylorSeer(1), SPARSE)
    with watching(pipe.transformer) as watch:
        forecast = pipe(STEPS)
    assert watch.blocks == len(FULL) * NUM_BLOCKS and summary(pipe).refused is None
    pipe.transformer.delete_adapters("style")
    if not lora_first:
        assert not torch.equal(forecast, without)
        assert torch.equal(pipe(STEPS), without)
    disable(pipe)
    assert torch.equal(pipe(STEPS), plain)


def test_lora_may_come_after_enable(pipe: TinyPipeline) -> None:
    add_lora(pipe, "style")
    enable(pipe, TaylorSeer(1), SPARSE)
    expected = pipe(STEPS)
    other = tiny_pipeline()
    enable(other, TaylorSeer(1), SPARSE)
    other(STEPS)
    add_lora(other, "style")
    assert torch.equal(other(STEPS), expected)
    other.transformer.disable_adapters()
    disable(pipe)
    pipe.transformer.disable_adapters()
    enable(pipe, TaylorSeer(1), SPARSE)
    assert torch.equal(other(STEPS), pipe(STEPS))


class Int8Linear(nn.Module):
    """Weights of eight bits with a scale for each row, as quantized models have: no floating point `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def by_rows(model: nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


def by_torchao(model: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="needs torchao")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))


# torchao's own remarks at its import.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("quantize", [by_rows, pytest.param(by_torchao, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantized_weights(quantize: Callable[[nn.Module], None], dtype: torch.dtype) -> None:
    pipe = tiny_pipeline()
    pipe.transformer.to(dtype)
    quantize(pipe.transformer)

    def convert(_: nn.Module, args: tuple[()], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        floats = ("hidden_states", "encoder_hidden_states", "pooled_projections")
        return args, kwargs | {name: kwargs[name].to(dtype) for name in floats}

    pipe.transformer.register_forward_pre_hook(convert, with_kwargs=True)
    plain = pipe(STEPS)
    enable(pipe, Reuse(), ALL)
    assert torch.equal(pipe(STEPS), plain)
    enable(pipe, TaylorSeer(1), SPARSE)
    with watching(pipe.transformer) as watch:
        pipe(STEPS)
    assert watch.blocks == len(FULL) * NUM_BLOCKS and summary(pipe).refused is None
    assert {feature.dtype for feature in watch.features} == {dtype}
    disable(pipe)
    assert torch.equal(pipe(STEPS), plain)

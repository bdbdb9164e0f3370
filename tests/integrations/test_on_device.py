"""A transformer in bfloat16, compiled, and offloaded, on the GPU where there is one, else on the CPU."""

from __future__ import annotations

import pytest
import torch
from accelerate import cpu_offload_with_hook
from tiny_flux import CHANNELS, NUM_BLOCKS, call_arguments, tiny_transformer
from torch import Tensor, nn

from lesa_kernels import Reuse, Schedule, TaylorSeer
from lesa_kernels.integrations import enable, summary

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEPS = 10
SPARSE = Schedule.explicit(STEPS, (0, 1, 5))
ALL = Schedule.explicit(STEPS, range(STEPS))
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]


@torch.no_grad()
def sampled(model: nn.Module, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE) -> Tensor:
    """The latents after a loop of Euler steps, float32 on the CPU."""
    latents = torch.randn(1, 6, CHANNELS, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    for step in range(STEPS):
        arguments = call_arguments(latents.cpu(), SIGMAS[step])
        velocity = model(**{name: value.to(device) for name, value in arguments.items()}, return_dict=False)[0]
        latents = latents + (SIGMAS[step + 1] - SIGMAS[step]) * velocity.to(device)
    return latents.float().cpu()


def relative(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.fixture
def expected() -> Tensor:
    """What the CPU makes of it in float32."""
    model = tiny_transformer()
    enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    return sampled(model, device=torch.device("cpu"))


def served(model: nn.Module) -> bool:
    found = summary(model)
    return found.refused is None and (found.full, found.forecast) == (3, 7) and found.skipped_blocks == 7 * NUM_BLOCKS


def test_bfloat16(expected: Tensor) -> None:
    model = tiny_transformer().to(DEVICE, torch.bfloat16)
    plain = sampled(model, torch.bfloat16)
    enable(model, Reuse(), ALL, sigmas=SIGMAS)
    assert torch.equal(sampled(model, torch.bfloat16), plain)
    enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    forecast = sampled(model, torch.bfloat16)
    assert served(model) and not torch.equal(forecast, plain)
    assert relative(forecast, expected) < 0.02


def test_compiled(expected: Tensor) -> None:
    torch._dynamo.reset()
    model = tiny_transformer().to(DEVICE)
    # On the CPU the compiler's kernels are not what is tested.
    model.compile(fullgraph=True, backend="inductor" if DEVICE.type == "cuda" else "eager")
    enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    assert relative(sampled(model), expected) < 1e-4
    assert relative(sampled(model), expected) < 1e-4
    assert served(model)


@pytest.mark.parametrize("enabled_first", [True, False])
def test_offloaded(enabled_first: bool, expected: Tensor) -> None:
    """Before each call the model moves to the device, afterwards its output stays there."""
    model = tiny_transformer()
    if enabled_first:
        enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    model, hook = cpu_offload_with_hook(model, DEVICE)
    if not enabled_first:
        enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    assert relative(sampled(model), expected) < 1e-4
    assert served(model)
    hook.offload()
    assert next(model.parameters()).device.type == "cpu"
    assert relative(sampled(model), expected) < 1e-4

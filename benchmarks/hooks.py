"""`python -m benchmarks.hooks`: host time of a cached step beyond the model's own tail, at FLUX's block count."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import FluxTransformer2DModel
from diffusers.utils.peft_utils import apply_lora_scale
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lesa_kernels as lesa
from benchmarks import results
from benchmarks.harness import row_of
from lesa_kernels.integrations import Adapter, register_adapter
from lesa_kernels.integrations.models import find_adapter, flux_tail

OP = "cached step"
BLOCKS = (19, 38)
STEPS = 50
FULL = (0, 1, 25)
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
# As the model's own forward is, and as the hook calls it.
scaled_tail = apply_lora_scale("joint_attention_kwargs")(flux_tail)


def build_model() -> FluxTransformer2DModel:
    """Make a FLUX of the real depth, of a width that leaves next to nothing to compute."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=BLOCKS[0],
        num_single_layers=BLOCKS[1],
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    ).eval()


def call_arguments(step: int) -> dict[str, Any]:
    """Make the arguments of a call: one image token, one text token."""
    return {
        "hidden_states": torch.randn(1, 1, 4),
        "encoder_hidden_states": torch.randn(1, 1, 8),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([SIGMAS[step]]),
        "img_ids": torch.zeros(1, 3),
        "txt_ids": torch.zeros(1, 3),
        "guidance": torch.tensor([3.5]),
        "return_dict": False,
    }


@torch.no_grad()
def measure(model: FluxTransformer2DModel, runs: int) -> tuple[list[float], list[float]]:
    """Time the forecast steps of some runs, each next to the tail alone.

    Returns:
        Seconds of the cached steps, and of the tails.

    Raises:
        AssertionError: when a cached step does not give what the tail gives for its feature.
    """
    _check(model)
    cached, tails = [], []
    feature = torch.randn(1, 1, model.inner_dim)
    for _ in range(runs):
        for step in range(STEPS):
            arguments = call_arguments(step)
            begin = time.perf_counter()
            model(**arguments)
            middle = time.perf_counter()
            scaled_tail(model, feature, **arguments)
            end = time.perf_counter()
            if step not in FULL:
                cached.append(middle - begin)
                tails.append(end - middle)
    return cached, tails


def _check(model: FluxTransformer2DModel) -> None:
    """Require that every cached step is the tail on its forecast."""
    with lesa.recorded(model) as features:
        calls = [call_arguments(step) for step in range(STEPS)]
        outputs: list[Tensor] = [model(**arguments)[0] for arguments in calls]
    for step in range(STEPS):
        torch.testing.assert_close(scaled_tail(model, features[step], **calls[step])[0], outputs[step])
    if lesa.summary(model).forecast != STEPS - len(FULL):
        raise AssertionError(f"the plan was not followed: {lesa.summary(model)}")


def main(
    runs: Annotated[int, typer.Option(help="Runs of 50 steps.", min=1)] = 20,
    save: Annotated[bool, typer.Option(help="Append what is beyond the tail to the results.")] = False,
    out: Annotated[Path, typer.Option(help="The file of the results.")] = results.RESULTS,
) -> None:
    """Print medians for FLUX's adapter and for the one that any model gets, and the mean of what is beyond the tail."""
    torch.set_num_threads(1)
    origin = results.origin(torch.device("cpu"), module="benchmarks.hooks")
    model = build_model()
    rows = []
    table = Table("adapter", "cached step, us", "its tail alone, us", "beyond the tail, us", "mean, us")
    flux = find_adapter(model)
    adapters: dict[str, Adapter] = {"FLUX": flux, "any model": replace(flux, tail=None)}
    for name, adapter in adapters.items():
        register_adapter(adapter)
        with lesa.enabled(model, lesa.TaylorSeer(2), lesa.Schedule.explicit(STEPS, FULL), sigmas=SIGMAS):
            cached, tails = measure(model, runs)
        beyond = [one - other for one, other in zip(cached, tails, strict=True)]
        medians = (f"{statistics.median(times) * 1e6:.0f}" for times in (cached, tails, beyond))
        rows.append(row_of(OP, f"{sum(BLOCKS)} blocks, one token", f"{name}, beyond the tail", beyond, origin))
        table.add_row(name, *medians, f"{statistics.mean(beyond) * 1e6:.0f}")
    register_adapter(flux)
    console = Console()
    console.print(f"{sum(BLOCKS)} blocks, torch {torch.__version__}, {platform.machine()}, one thread, medians")
    console.print(table)
    if save:
        results.save(rows, out)
        console.print(f"appended to {out.name}")


if __name__ == "__main__":
    typer.run(main)

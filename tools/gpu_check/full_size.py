"""Times a FLUX of full size with random weights, plain and with forecasts: no weights are needed to know the speed.

`python -m tools.gpu_check.full_size DEVICE RECORDS`; on the CPU a tiny model stands in for it.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lesa_kernels as lesa
from tools.gpu_check.processes import run_all
from tools.gpu_check.records import LEFT_OUT, PASSED, Record, append
from tools.gpu_check.settings import RECORDS, ROOT, Settings

PHASE = "full size"
# FLUX.1-dev, from its published config.json.
CHANNELS = 64
FLUX = {
    "in_channels": CHANNELS,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
TINY = FLUX | {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 8,
    "pooled_projection_dim": 8,
    "axes_dims_rope": (4, 6, 6),
}
IMAGE_TOKENS, TEXT_TOKENS = (64, 64), 512  # 1024x1024 pixels
TINY_TOKENS, TINY_TEXT = (4, 4), 8
# Two full steps to start with, then segments of six forecasts.
SCHEDULE = lesa.Schedule(16, (0, 1, 8, 15))
PLAIN_STEPS = 3


def run(settings: Settings, seconds: float) -> None:
    """Time the model in a process of its own, where diffusers is there."""
    if importlib.util.find_spec("diffusers") is None and not (settings.site / "diffusers").is_dir():
        settings.record(Record(PHASE, "FLUX", LEFT_OUT, "diffusers is not installed and was not carried"))
        return
    job = settings.module("full-size", "tools.gpu_check.full_size", settings.device, str(settings.out / RECORDS))
    run_all([job], ROOT, settings.env(), seconds)
    settings.record_end(PHASE, job)


def made(device: torch.device) -> nn.Module:
    """Return the model in bfloat16, made on the device."""
    from diffusers import FluxTransformer2DModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = FluxTransformer2DModel(**(FLUX if device.type == "cuda" else TINY))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)  # type: ignore[no-any-return]


def arguments_of(model: nn.Module, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a call that stay the same, for a picture of 1024x1024 pixels."""
    (height, width), text = (IMAGE_TOKENS, TEXT_TOKENS) if device.type == "cuda" else (TINY_TOKENS, TINY_TEXT)
    config: Any = model.config
    image_ids = torch.zeros(height, width, 3, device=device)
    image_ids[..., 1] = torch.arange(height, device=device)[:, None]
    image_ids[..., 2] = torch.arange(width, device=device)
    return {
        "encoder_hidden_states": torch.randn(1, text, config.joint_attention_dim, device=device).bfloat16(),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, device=device).bfloat16(),
        "guidance": torch.full((1,), 3.5, device=device),
        "img_ids": image_ids.flatten(0, 1),
        "txt_ids": torch.zeros(text, 3, device=device),
        "return_dict": False,
    }


def sampled(model: nn.Module, arguments: dict[str, Any], sigmas: Sequence[float], steps: int) -> list[float]:
    """Run the first steps of a sampling loop; return the seconds of each call of the model."""
    device = arguments["img_ids"].device
    latents: Tensor = torch.randn(1, len(arguments["img_ids"]), CHANNELS, device=device).bfloat16()
    seconds = []
    for step in range(steps):
        timestep = torch.full((1,), sigmas[step], device=device).bfloat16()
        _wait(device)
        begin = time.perf_counter()
        velocity = model(hidden_states=latents, timestep=timestep, **arguments)[0]
        _wait(device)
        seconds.append(time.perf_counter() - begin)
        latents = latents + (sigmas[step + 1] - sigmas[step]) * velocity
    if not bool(torch.isfinite(latents).all()):
        raise ValueError("latents must stay finite")
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(device_type: str, records: Path) -> None:
    """Time a plain step, a full step and a cached step."""
    device, begin = torch.device(device_type), time.monotonic()
    torch.manual_seed(0)
    model = made(device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    append(Record(PHASE, "model", PASSED, f"{parameters / 1e9:.2f} B parameters", time.monotonic() - begin), records)
    sigmas = [1 - step / SCHEDULE.num_steps for step in range(SCHEDULE.num_steps + 1)]
    with torch.inference_mode():
        arguments = arguments_of(model, device)
        sampled(model, arguments, sigmas, 1)
        plain = statistics.median(sampled(model, arguments, sigmas, PLAIN_STEPS))
        append(Record(PHASE, "plain", PASSED, f"{plain:.4f} s a step", 0, {"plain_step_s": plain}), records)
        lesa.enable(model, lesa.TaylorSeer(order=2), SCHEDULE, sigmas=sigmas)
        sampled(model, arguments, sigmas, SCHEDULE.num_steps)
        calls = sampled(model, arguments, sigmas, SCHEDULE.num_steps)
    full = statistics.median(calls[step] for step in SCHEDULE.full_steps)
    cached = statistics.median(calls[step] for step in range(len(calls)) if step not in SCHEDULE.full_steps)
    summary = lesa.summary(model)
    if summary.refused or not summary.forecast:
        raise ValueError(f"forecasts must serve the run, it ran in full: {summary.refused}")
    figures = {
        "plain_step_s": plain,
        "full_step_s": full,
        "cached_step_s": cached,
        "run_s": sum(calls),
        "run_of_plain_steps_s": plain * len(calls),
        "history_mib": summary.history_bytes / 2**20,
        "parameters": parameters,
        "calls": len(calls),
        "full_calls": len(SCHEDULE.full_steps),
    }
    append(Record(PHASE, "enabled", PASSED, str(summary), sum(calls), figures), records)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

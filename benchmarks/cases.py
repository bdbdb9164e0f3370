"""Provides the sizes, names of variants, tolerances and random features that cases share."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.clock import Run
from benchmarks.harness import COPY, Variant
from lesa_kernels.ops import TOLERANCES, Tolerance
from lesa_kernels.predictors.kan_network import KANLinear

EAGER = "published eager form"
COMPILED = "torch.compile of the folded sum"
COMPILED_EAGER = "torch.compile of the published form"
COMPILED_ROWS = "torch.compile of the folded rows"
ADDITION = "torch.add of two of the features"
INTO = "lesa::forecast_into, memory that is there"
ALL_THREADS = "lesa::forecast_into, all threads"
ONE_THREAD = "lesa::forecast_into, one thread"
TAYLOR_LOOP = "TaylorSeer as its authors loop"
COMPILED_LOOP = "torch.compile of TaylorSeer's loop"
SOLVE = "Spectrum as SGLang solves it"
EAGER_BACKWARD = "autograd of the published form, backward only"
COMPILED_BACKWARD = "torch.compile of the folded backward"
EAGER_STEP = "eager forward and backward"
COMPILED_STEP = "torch.compile of the eager form"
TUNED = ", max-autotune"
"""Ends the name of what is compiled with `mode="max-autotune-no-cudagraphs"`; graphs are captured of both."""
KAN_WIDTHS = (51, 256, 256, 1)

# Sums of 1e7 terms of size 1, and signs that turn where forecast and target meet.
SUMS = Tolerance(2e-5, 1e-6)
# The same, added up in float32.
FLOAT32_SUMS = Tolerance(1e-3, 1e-6)
# Three layers of up to 256 x 9 float32 terms, relative to the largest value.
LAYERS = Tolerance(5e-5, 1e-6)

# The models' features at these resolutions; a video has 129 frames, so 33 latent ones.
SIZES: dict[str, tuple[int, ...]] = {
    "FLUX 1024x1024": (1, 4096, 3072),
    "Qwen-Image 1328x1328": (1, 6889, 3072),
    "HunyuanVideo 720p, model output": (1, 16, 33, 90, 160),
    "HunyuanVideo 720p, hidden": (1, 33 * 45 * 80, 3072),
    "digits, batch 20": (20, 49, 128),
    "8 x 8": (8, 8),
    "200 x 1000 elements": (200, 1000),
}
# Independent random numbers in a feature; a larger one repeats them, as making them would take longer than measuring.
POOL = 2**22
# Elements at each end of an output that are checked.
CHECKED = 2**22


def implementations(device: torch.device) -> dict[str, Any]:
    """Return prefix of a variant's name -> its ops: what the dispatcher serves and, on CUDA, Triton's kernels."""
    found: dict[str, Any] = {"lesa::": torch.ops.lesa}
    if device.type == "cuda":
        found["Triton "] = importlib.import_module("lesa_kernels.backends.triton")
    return found


def half_rounded(dtype: torch.dtype) -> Tolerance:
    """What a form is allowed that rounds every intermediate result to the features' dtype."""
    tolerance = TOLERANCES[dtype]
    return Tolerance(4 * tolerance.relative, 4 * tolerance.absolute)


def wider(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a reference that is exact enough beside features of a dtype."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as titles show it."""
    return str(dtype).removeprefix("torch.")


def random_features(
    shape: Sequence[int], count: int, dtype: torch.dtype, sets: int, device: torch.device
) -> list[list[Tensor]]:
    """Return input sets of `count` random features each."""
    elements = math.prod(shape)
    if elements <= POOL:
        return [[torch.randn(*shape, device=device).to(dtype) for _ in range(count)] for _ in range(sets)]
    pool = torch.randn(POOL, device=device).to(dtype)
    repeats = -(-elements // POOL)

    def feature(number: int) -> Tensor:
        return pool.roll(1009 * number).repeat(repeats)[:elements].view(*shape)

    return [[feature(index * count + k) for k in range(count)] for index in range(sets)]


def ends(output: Tensor) -> Tensor:
    """Return the elements of an output that are checked: all of a small one."""
    flat = output.reshape(-1)
    return flat if flat.numel() <= 2 * CHECKED else torch.cat([flat[:CHECKED], flat[-CHECKED:]])


def size_of(shape: Sequence[int]) -> str:
    """Return the name of a size, which is made where it has none."""
    known = {shape: name for name, shape in SIZES.items()}
    name = known.get(tuple(shape), " x ".join(map(str, shape)) + " elements")
    SIZES.setdefault(name, tuple(shape))
    return name


def copy_variant(moved_bytes: int, sets: int, device: torch.device) -> Variant:
    """A plain copy that reads and writes as many bytes in all, into memory that is there."""
    elements = max(1, moved_bytes // 8)
    sources, targets = ([torch.randn(elements, device=device) for _ in range(sets)] for _ in range(2))
    return Variant(COPY, lambda turn: [targets[turn % sets].copy_(sources[turn % sets])], None)


def compiled(
    name: str,
    function: Callable[..., Any],
    of: Callable[[Callable[..., Any]], Run],
    tolerance: Tolerance,
    device: torch.device,
    tuned: bool = False,
) -> list[Variant]:
    """Return variants that call what `torch.compile` makes of a function; on CUDA also one that it tunes.

    Args:
        name: of the variant.
        function: to be compiled.
        of: makes a run that calls the compiled function.
        tolerance: of the variants.
        device: of the case.
        tuned: whether that may take the time; with products of matrices it takes minutes.
    """
    modes = {name: None, name + TUNED: "max-autotune-no-cudagraphs"}
    return [
        Variant(
            title, of(torch.compile(function, fullgraph=True, dynamic=False, mode=mode)), tolerance, both_modes=False
        )
        for title, mode in modes.items()
        if mode is None or (tuned and device.type == "cuda")
    ]


def kan_parameters(layers: Sequence[KANLinear]) -> list[Tensor]:
    """Return what a training updates of KAN layers."""
    return [tensor for layer in layers for tensor in (layer.base_weight, layer.spline_weight, layer.spline_scaler)]

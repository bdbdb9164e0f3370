"""The cases of inference: one forecast, a segment of forecasts, a feature kept; the sizes and what cases share."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import folded_rows, folded_sum, published_eager
from benchmarks.clock import Clock, Run
from benchmarks.harness import COPY, Case, Variant, sets_needed
from lesa_kernels import reference
from lesa_kernels.reference import TOLERANCES, Tolerance

EAGER = "published eager form"
COMPILED = "torch.compile of the folded sum"
COMPILED_ROWS = "torch.compile of the folded rows"
CAPTURED = ", captured"

SIZES = {
    "FLUX 1024x1024": (1, 4096, 3072),
    "Qwen-Image 1328x1328": (1, 6889, 3072),
    "digits, batch 20": (20, 49, 128),
}


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
    return [[torch.randn(*shape, device=device).to(dtype) for _ in range(count)] for _ in range(sets)]


def copy_variant(moved_bytes: int, sets: int, device: torch.device) -> Variant:
    """A plain copy that reads and writes as many bytes in all, into memory that is there."""
    elements = max(1, moved_bytes // 8)
    sources = [torch.randn(elements, device=device) for _ in range(sets)]
    target = torch.empty_like(sources[0])
    return Variant(COPY, lambda turn: [target.copy_(sources[turn % sets])], None)


def captured(variant: Variant, sets: int) -> Variant:
    """Return a variant that replays what CUDA graphs, one an input set, have captured of another."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first call sets up must not be captured
        variant.run(0)
    torch.cuda.current_stream().wait_stream(side)
    graphs, outputs = [], []
    for index in range(sets):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outputs.append(list(variant.run(index)))

    def run(turn: int) -> Sequence[Tensor]:
        graphs[turn % sets].replay()
        return outputs[turn % sets]

    return Variant(variant.name + CAPTURED, run, variant.tolerance)


def with_captured(variants: Sequence[Variant], sets: int, device: torch.device) -> list[Variant]:
    """Return the variants and, on CUDA, each as a captured graph as well: at small sizes launching is what costs."""
    graphs = [captured(variant, sets) for variant in variants] if device.type == "cuda" else []
    return [*variants, *graphs]


@torch.inference_mode()
def predict_case(
    size: str, clock: Clock, count: int = 8, dtype: torch.dtype = torch.bfloat16, small: bool = False
) -> Case:
    """One forecast of K features; `small` adds captured graphs."""
    shape, device = SIZES[size], clock.device
    moved = (count + 1) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    history = random_features(shape, count, dtype, sets, device)
    weight, bias, gain = (torch.randn(length, device=device) for length in (count, 1, 1))
    coefficients, offset = gain * weight, (gain * bias).reshape(())
    coefficients[-1] += 1
    compiled: Callable[..., Tensor] = torch.compile(folded_sum, fullgraph=True, dynamic=False)
    exact = TOLERANCES[dtype]

    def at(turn: int) -> list[Tensor]:
        return history[turn % sets]

    def served(ops: Any) -> Run:
        return lambda turn: [ops.predict(at(turn), weight, bias, gain)]

    variants = [
        *(Variant(f"{name}predict", served(ops), exact) for name, ops in implementations(device).items()),
        Variant(COMPILED, lambda turn: [compiled(at(turn), coefficients, offset)], exact),
        Variant(EAGER, lambda turn: [published_eager(at(turn), weight, bias, gain)], half_rounded(dtype)),
    ]
    if small:
        variants = with_captured(variants, sets, device)
    wide = [tensor.to(wider(dtype)) for tensor in (*at(0), weight, bias, gain)]
    return Case(
        "predict",
        f"{size}, K={count}, {dtype_name(dtype)}",
        moved,
        [reference.predict(wide[:count], *wide[count:])],
        [reference.predict([tensor.abs() for tensor in wide[:count]], *(tensor.abs() for tensor in wide[count:]))],
        [*variants, copy_variant(moved, sets, device)],
    )


@torch.inference_mode()
def forecast_case(
    size: str, clock: Clock, count: int = 8, rows: int = 6, dtype: torch.dtype = torch.bfloat16, small: bool = False
) -> Case:
    """A segment: M forecasts of K features in one pass, against M single ones; `small` adds captured graphs."""
    shape, device = SIZES[size], clock.device
    moved = (count + rows) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    rings = [torch.randn(count + rows, *shape, device=device).to(dtype) for _ in range(sets)]
    coefficients, offsets = torch.randn(rows, count, device=device), torch.randn(rows, device=device)
    compiled: Callable[..., list[Tensor]] = torch.compile(folded_rows, fullgraph=True, dynamic=False)
    read, write = list(range(count)), list(range(count, count + rows))
    # A predict adds the newest feature once; the row without it gives the same forecast.
    rest, one = coefficients.clone(), torch.ones(1, device=device)
    rest[:, -1] -= 1
    single = [(rest[m], offsets[m : m + 1], one) for m in range(rows)]
    histories, written = [list(ring[:count]) for ring in rings], [list(ring[count:]) for ring in rings]
    exact = TOLERANCES[dtype]

    def at(turn: int) -> list[Tensor]:
        return histories[turn % sets]

    def into(ops: Any) -> Run:
        def run(turn: int) -> list[Tensor]:
            ops.forecast_into(rings[turn % sets], coefficients, offsets, read, write)
            return written[turn % sets]

        return run

    def fresh(ops: Any) -> Run:
        return lambda turn: ops.forecast(at(turn), coefficients, offsets)

    def singles(predict: Callable[..., Tensor]) -> Run:
        return lambda turn: [predict(at(turn), *parameters) for parameters in single]

    kernels = implementations(device).items()
    variants = [
        *(Variant(f"{name}forecast_into", into(ops), exact) for name, ops in kernels),
        *(Variant(f"{name}forecast", fresh(ops), exact) for name, ops in kernels),
        Variant(f"{rows} x lesa::predict", singles(torch.ops.lesa.predict), exact),
        Variant(COMPILED_ROWS, lambda turn: compiled(at(turn), coefficients, offsets), exact),
        Variant(f"{rows} x {EAGER}", singles(published_eager), half_rounded(dtype)),
    ]
    if small:
        variants = with_captured(variants, sets, device)
    features = [feature.to(wider(dtype)) for feature in at(0)]
    matrix, shifts = coefficients.to(wider(dtype)), offsets.to(wider(dtype))
    return Case(
        "forecast",
        f"{size}, K={count}, M={rows}, {dtype_name(dtype)}",
        moved,
        reference.forecast(features, matrix, shifts),
        reference.forecast([feature.abs() for feature in features], matrix.abs(), shifts.abs()),
        [*variants, copy_variant(moved, sets, device)],
    )


@torch.inference_mode()
def push_case(size: str, clock: Clock, dtype: torch.dtype = torch.bfloat16, small: bool = False) -> Case:
    """A feature kept in the ring, against `Tensor.copy_`."""
    shape, device = SIZES[size], clock.device
    moved = 2 * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    ring = torch.randn(sets, *shape, device=device).to(dtype)  # memory that nothing touched yet would cost page faults
    features = [row[0] for row in random_features(shape, 1, dtype, sets, device)]
    exact = Tolerance(0, 0)

    def served(ops: Any) -> Run:
        def run(turn: int) -> list[Tensor]:
            ops.push(ring, features[turn % sets], turn % sets)
            return [ring[turn % sets]]

        return run

    variants = [
        *(Variant(f"{name}push", served(ops), exact) for name, ops in implementations(device).items()),
        Variant("Tensor.copy_", lambda turn: [ring[turn % sets].copy_(features[turn % sets])], exact),
    ]
    if small:
        variants = with_captured(variants, sets, device)
    want = features[0].float()
    return Case(
        "push", f"{size}, {dtype_name(dtype)}", moved, [want], [want], [*variants, copy_variant(moved, sets, device)]
    )

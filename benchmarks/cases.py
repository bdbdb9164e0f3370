"""The cases: which op, which size, against what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.baselines import folded_rows, folded_sum, published_eager
from benchmarks.harness import COPY, Case, Variant, sets_needed
from lesa_kernels import reference

SIZES = {
    "FLUX 1024x1024": (1, 4096, 3072),
    "digits, batch 20": (20, 49, 128),
}


def _history(shape: Sequence[int], count: int, dtype: torch.dtype, sets: int) -> list[list[Tensor]]:
    return [[torch.randn(*shape).to(dtype) for _ in range(count)] for _ in range(sets)]


def _copy(moved_bytes: int, sets: int) -> Variant:
    """A plain copy that reads and writes as many bytes, into memory that is there."""
    elements = moved_bytes // 4
    sources = [torch.zeros(elements // 2, dtype=torch.float32) for _ in range(sets)]
    target = torch.empty_like(sources[0])

    def run(turn: int) -> list[Tensor]:
        return [target.copy_(sources[turn % len(sources)])]

    return Variant(COPY, run, checked=False)


def predict_case(size: str, count: int = 8, dtype: torch.dtype = torch.bfloat16) -> Case:
    """One forecast of K features."""
    shape = SIZES[size]
    moved = (count + 1) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved)
    history = _history(shape, count, dtype, sets)
    weight, bias, gain = torch.randn(count), torch.randn(1), torch.rand(1)
    coefficients, offset = gain * weight, (gain * bias).reshape(())
    coefficients[-1] += 1
    compiled: Callable[..., Tensor] = torch.compile(folded_sum, fullgraph=True)

    def at(turn: int) -> list[Tensor]:
        return history[turn % sets]

    wide = reference.predict([feature.float() for feature in at(0)], weight, bias, gain)
    variants = [
        Variant("lesa::predict", lambda turn: [torch.ops.lesa.predict(at(turn), weight, bias, gain)]),
        Variant("torch.compile of the folded sum", lambda turn: [compiled(at(turn), coefficients, offset)]),
        Variant("published eager form", lambda turn: [published_eager(at(turn), weight, bias, gain)]),
        _copy(moved, sets),
    ]
    # The published form rounds every intermediate result to the features' dtype.
    return Case("predict", f"{size}, K={count}, {_name(dtype)}", moved, [wide], 8 * torch.finfo(dtype).eps, variants)


def forecast_case(size: str, count: int = 8, rows: int = 6, dtype: torch.dtype = torch.bfloat16) -> Case:
    """A segment: M forecasts of K features in one pass, against M single ones."""
    shape = SIZES[size]
    moved = (count + rows) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved)
    history = _history(shape, count, dtype, sets)
    coefficients, offsets = torch.randn(rows, count), torch.randn(rows)
    rings = [torch.stack([*features, *(torch.zeros(shape, dtype=dtype) for _ in range(rows))]) for features in history]
    compiled: Callable[..., list[Tensor]] = torch.compile(folded_rows, fullgraph=True)
    read, write = list(range(count)), list(range(count, count + rows))
    # A predict adds the newest feature once; the row without it gives the same forecast.
    rest, one = coefficients.clone(), torch.ones(1)
    rest[:, -1] -= 1

    def at(turn: int) -> list[Tensor]:
        return history[turn % sets]

    def into(turn: int) -> list[Tensor]:
        ring = rings[turn % len(rings)]
        torch.ops.lesa.forecast_into(ring, coefficients, offsets, read, write)
        return [ring[slot] for slot in write]

    def singles(turn: int) -> list[Tensor]:
        return [torch.ops.lesa.predict(at(turn), rest[m], offsets[m : m + 1], one) for m in range(rows)]

    wide = reference.forecast([feature.float() for feature in at(0)], coefficients, offsets)
    variants = [
        Variant("lesa::forecast_into", into),
        Variant("lesa::forecast", lambda turn: torch.ops.lesa.forecast(at(turn), coefficients, offsets)),
        Variant(f"{rows} x lesa::predict", singles),
        Variant("torch.compile of the folded rows", lambda turn: compiled(at(turn), coefficients, offsets)),
        _copy(moved, sets),
    ]
    return Case(
        "forecast", f"{size}, K={count}, M={rows}, {_name(dtype)}", moved, wide, 8 * torch.finfo(dtype).eps, variants
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""The cases of whole segments: a full step's feature kept, and M forecasts from it, against how others compute them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import (
    chebyshev_features,
    chebyshev_fit,
    chebyshev_forecast,
    published_taylor_segment,
    published_taylor_update,
)
from benchmarks.cases import (
    SIZES,
    compiled,
    copy_variant,
    dtype_name,
    ends,
    half_rounded,
    implementations,
    random_features,
    wider,
)
from benchmarks.clock import Clock, Run
from benchmarks.harness import Case, Variant, sets_needed
from lesa_kernels.ops import TOLERANCES, Tolerance, reference
from lesa_kernels.predictors.taylor import taylor_weights

TAYLOR_LOOP = "TaylorSeer as its authors loop"
COMPILED_LOOP = "torch.compile of TaylorSeer's loop"
SOLVE = "Spectrum as SGLang solves it"


def _segment_case(
    op: str,
    detail: str,
    size: str,
    clock: Clock,
    coefficients: Tensor,
    dtype: torch.dtype,
    baselines: Callable[[list[list[Tensor]]], list[Variant]],
) -> Case:
    """A feature is kept as the newest of K, M forecasts follow; `baselines` makes variants of sets of K features."""
    (rows, count), shape, device = coefficients.shape, SIZES[size], clock.device
    # The feature is read and kept; K are read for the forecasts.
    moved = (2 + count + rows) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    features = random_features(shape, count, dtype, sets, device)
    rings = [torch.stack([*known[:-1], *[known[0]] * (rows + 1)]) for known in features]
    offsets, read, write = torch.zeros(rows, device=device), list(range(count)), list(range(count, count + rows))

    def of(ops: Any) -> Run:
        def run(turn: int) -> list[Tensor]:
            ring = rings[turn % sets]
            ops.push(ring, features[turn % sets][-1], count - 1)
            ops.forecast_into(ring, coefficients, offsets, read, write)
            return list(ring[count:])

        return run

    wide = [ends(feature).to(wider(dtype)) for feature in features[0]]
    matrix, zeros = coefficients.to(wider(dtype)), offsets.to(wider(dtype))
    exact = TOLERANCES[dtype]
    kernels = implementations(device).items()
    return Case(
        op,
        f"{size}, {detail}, M={rows}, {dtype_name(dtype)}",
        moved,
        reference.forecast(wide, matrix, zeros),
        reference.forecast([feature.abs() for feature in wide], matrix.abs(), zeros),
        [
            *(Variant(f"{name}push, forecast_into", of(ops), exact) for name, ops in kernels),
            *baselines(features),
            copy_variant(moved, sets, device),
        ],
        checked=ends,
        sets=sets,
    )


@torch.no_grad()
def taylor_case(size: str, clock: Clock, rows: int = 6, dtype: torch.dtype = torch.bfloat16) -> Case:
    """TaylorSeer's segment of order 2."""
    order, interval = 2, rows + 1
    nodes = [0.0, float(interval), 2.0 * interval]
    weights = [taylor_weights(nodes, nodes[-1] + distance) for distance in range(1, interval)]

    def baselines(features: list[list[Tensor]]) -> list[Variant]:
        known = [published_taylor_update([oldest], middle, interval, order) for oldest, middle, _ in features]

        def of(segment: Callable[..., list[Tensor]]) -> Run:
            return lambda turn: segment(known[turn % len(known)], features[turn % len(known)][-1], interval, order)

        rounded = half_rounded(dtype)
        return [
            Variant(TAYLOR_LOOP, of(published_taylor_segment), rounded),
            *compiled(COMPILED_LOOP, published_taylor_segment, of, rounded, clock.device),
        ]

    coefficients = torch.tensor(weights, device=clock.device)
    return _segment_case("TaylorSeer segment", f"order {order}", size, clock, coefficients, dtype, baselines)


@torch.no_grad()
def spectrum_case(size: str, clock: Clock, count: int = 8, rows: int = 6, dtype: torch.dtype = torch.bfloat16) -> Case:
    """Spectrum's segment (arXiv 2603.01623): Chebyshev polynomials of order 4 fitted to K full steps of 50 by ridge.

    A forecast is linear in the features, so a plan has its coefficients; SGLang solves for polynomials of features.
    """
    order, ridge, interval, steps, device = 4, 0.1, rows + 1, 50, clock.device
    # Steps between -1 and 1; the last full one leaves room for the segment.
    known = torch.arange(count, device=device).mul(steps // count).mul(2 / steps).sub(1)
    wanted = known[-1] + torch.arange(1, interval, device=device) * (2 / steps)
    basis = chebyshev_features(known.double(), order)
    fit = torch.linalg.solve(basis.T @ basis + ridge * torch.eye(order + 1).to(basis), basis.T)
    ahead = chebyshev_features(wanted.double(), order)
    coefficients = ahead @ fit
    # The published order of operations rounds polynomials of features, whose terms are larger than those of forecasts.
    grown = float(((ahead.abs() @ fit.abs()).sum(1) / coefficients.abs().sum(1)).max())
    rounded = Tolerance(grown * half_rounded(dtype).relative, half_rounded(dtype).absolute)

    def baselines(features: list[list[Tensor]]) -> list[Variant]:
        buffers = [torch.stack([feature.flatten().float() for feature in known]) for known in features]

        def solved(turn: int) -> list[Tensor]:
            newest, buffer = features[turn % len(features)][-1], buffers[turn % len(features)]
            buffer[-1] = newest.flatten()
            fitted = chebyshev_fit(buffer, known, order, ridge).to(dtype)
            return [chebyshev_forecast(fitted, step, order).view(newest.shape) for step in wanted]

        # The solver waits for the device to learn whether it could.
        return [Variant(SOLVE, solved, rounded, capture=False)]

    return _segment_case(
        "Spectrum segment", f"K={count}, order {order}", size, clock, coefficients.float(), dtype, baselines
    )

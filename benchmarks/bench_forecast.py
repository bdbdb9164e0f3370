"""Times segments of forecasts, features kept, and both together against how others compute them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import (
    chebyshev_features,
    chebyshev_fit,
    chebyshev_forecast,
    folded_rows,
    published_eager,
    published_taylor_segment,
    published_taylor_update,
)
from benchmarks.cases import (
    ALL_THREADS,
    COMPILED_LOOP,
    COMPILED_ROWS,
    EAGER,
    ONE_THREAD,
    SIZES,
    SOLVE,
    TAYLOR_LOOP,
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
from benchmarks.harness import COPY, Case, Variant, sets_needed
from lesa_kernels.ops import TOLERANCES, Tolerance, reference
from lesa_kernels.predictors.taylor import taylor_weights


@torch.no_grad()
def forecast_case(
    size: str,
    clock: Clock,
    count: int = 8,
    rows: int = 6,
    dtype: torch.dtype = torch.bfloat16,
    published: bool = True,
) -> Case:
    """A segment: M forecasts of K features in one pass, against M single ones, into memory that is there or fresh.

    `published` as in `predict_case`.
    """
    shape, device = SIZES[size], clock.device
    moved = (count + rows) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    rings = [torch.stack(features) for features in random_features(shape, count + rows, dtype, sets, device)]
    coefficients, offsets = torch.randn(rows, count, device=device), torch.randn(rows, device=device)
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

    def fresh(forecast: Callable[..., list[Tensor]]) -> Run:
        return lambda turn: forecast(at(turn), coefficients, offsets)

    def one_by_one(turn: int) -> list[Tensor]:
        for m in range(rows):
            torch.ops.lesa.forecast_into(
                rings[turn % sets], coefficients[m : m + 1], offsets[m : m + 1], read, [count + m]
            )
        return written[turn % sets]

    def singles(predict: Callable[..., Tensor]) -> Run:
        return lambda turn: [predict(at(turn), *parameters) for parameters in single]

    kernels = implementations(device).items()
    variants = [
        *(Variant(f"{name}forecast_into", into(ops), exact) for name, ops in kernels),
        *(Variant(f"{name}forecast", fresh(ops.forecast), exact) for name, ops in kernels),
        Variant(f"{rows} x lesa::forecast_into of one", one_by_one, exact),
        Variant(f"{rows} x lesa::predict", singles(torch.ops.lesa.predict), exact),
        *compiled(COMPILED_ROWS, folded_rows, fresh, exact, device, tuned=True),
    ]
    if published:
        variants.append(Variant(f"{rows} x {EAGER}", singles(published_eager), half_rounded(dtype)))
    features = [ends(feature).to(wider(dtype)) for feature in at(0)]
    matrix, shifts = coefficients.to(wider(dtype)), offsets.to(wider(dtype))
    # Single forecasts add the newest feature and, by its coefficient, take it off again.
    magnitudes = matrix.abs()
    magnitudes[:, -1] += 2
    return Case(
        "forecast",
        f"{size}, K={count}, M={rows}, {dtype_name(dtype)}",
        moved,
        reference.forecast(features, matrix, shifts),
        reference.forecast([feature.abs() for feature in features], magnitudes, shifts.abs()),
        [*variants, copy_variant(moved, sets, device)],
        checked=ends,
        sets=sets,
    )


@torch.no_grad()
def push_case(size: str, clock: Clock, dtype: torch.dtype = torch.bfloat16) -> Case:
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
    want = features[0].float()
    return Case(
        "push",
        f"{size}, {dtype_name(dtype)}",
        moved,
        [want],
        [want],
        [*variants, copy_variant(moved, sets, device)],
        sets=sets,
    )


@torch.no_grad()
def threads_case(
    size: str, clock: Clock, count: int = 8, dtype: torch.dtype = torch.bfloat16, cold: bool = True
) -> Case:
    """One forecast on one thread, and on all; with `cold` the inputs come from memory, else from the last cache."""
    shape, device = SIZES[size], clock.device
    moved = (count + 1) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes() if cold else 0)
    rings = [torch.stack(features) for features in random_features(shape, count + 1, dtype, sets, device)]
    coefficients, offsets = torch.randn(1, count, device=device), torch.randn(1, device=device)
    read = list(range(count))

    def run(turn: int) -> list[Tensor]:
        torch.ops.lesa.forecast_into(rings[turn % sets], coefficients, offsets, read, [count])
        return [rings[turn % sets][count]]

    wide = [ends(feature).to(wider(dtype)) for feature in rings[0][:count]]
    matrix, shifts = coefficients.to(wider(dtype)), offsets.to(wider(dtype))
    copy = copy_variant(moved, sets, device)
    return Case(
        "threads",
        f"{size}, K={count}, {dtype_name(dtype)}, {'from memory' if cold else 'in the cache'}",
        moved,
        reference.forecast(wide, matrix, shifts),
        reference.forecast([feature.abs() for feature in wide], matrix.abs(), shifts.abs()),
        [
            Variant(ALL_THREADS, run, TOLERANCES[dtype]),
            Variant(ONE_THREAD, run, TOLERANCES[dtype], threads=1),
            copy,
            replace(copy, name=f"{COPY}, one thread", threads=1),
        ],
        checked=ends,
        sets=sets,
    )


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

"""Times a forecast against its elements, inputs and rows, for the plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.baselines import folded_rows, published_eager
from benchmarks.cases import (
    SIZES,
    compiled,
    copy_variant,
    dtype_name,
    ends,
    half_rounded,
    random_features,
    size_of,
    wider,
)
from benchmarks.clock import Clock, Run
from benchmarks.harness import Case, Variant, sets_needed
from lesa_kernels.ops import TOLERANCES, reference

INTO, FRESH, EAGER, COMPILED = "lesa::forecast_into", "lesa::forecast", "published eager form", "torch.compile"


def elements_case(elements: int, clock: Clock) -> Case:
    """One forecast of 8 features of so many elements, down to sizes where a call costs more than its work."""
    return rows_case(size_of((elements,)), clock, count=8, rows=1, op="elements", published=True)


@torch.no_grad()
def rows_case(
    size: str,
    clock: Clock,
    *,
    count: int,
    rows: int,
    op: str,
    published: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> Case:
    """M forecasts of K features into memory that is there, and into fresh memory.

    Args:
        size: a key of `SIZES`.
        clock: of the device.
        count: K.
        rows: M.
        op: under which name the case is kept: what is varied.
        published: whether the authors' form is measured too, for one row.
        dtype: of the features.

    Returns:
        The case.
    """
    shape, device = SIZES[size], clock.device
    moved = (count + rows) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    rings = [torch.stack(features) for features in random_features(shape, count + rows, dtype, sets, device)]
    histories = [list(ring[:count]) for ring in rings]
    coefficients, offsets = torch.randn(rows, count, device=device), torch.randn(rows, device=device)
    read, write = list(range(count)), list(range(count, count + rows))
    rest, one = coefficients[0].clone(), torch.ones(1, device=device)
    rest[-1] -= 1

    def into(turn: int) -> Sequence[Tensor]:
        torch.ops.lesa.forecast_into(rings[turn % sets], coefficients, offsets, read, write)
        return list(rings[turn % sets][count:])

    def eager(turn: int) -> Sequence[Tensor]:
        return [published_eager(histories[turn % sets], rest, offsets, one)]

    def of(forecast: Callable[..., Sequence[Tensor]]) -> Run:
        return lambda turn: forecast(histories[turn % sets], coefficients, offsets)

    exact = TOLERANCES[dtype]
    variants = [
        Variant(INTO, into, exact),
        Variant(FRESH, of(torch.ops.lesa.forecast), exact),
        *compiled(COMPILED, folded_rows, of, exact, device),
    ]
    if published:
        variants.append(Variant(EAGER, eager, half_rounded(dtype)))
    features = [ends(feature).to(wider(dtype)) for feature in histories[0]]
    matrix, shifts = coefficients.to(wider(dtype)), offsets.to(wider(dtype))
    # The authors' form adds the newest feature and, by its coefficient, takes it off again.
    magnitudes = matrix.abs()
    magnitudes[:, -1] += 2
    return Case(
        op,
        f"{size}, K={count}, M={rows}, {dtype_name(dtype)}",
        moved,
        reference.forecast(features, matrix, shifts),
        reference.forecast([feature.abs() for feature in features], magnitudes, shifts.abs()),
        [*variants, copy_variant(moved, sets, device)],
        checked=ends,
        sets=sets,
    )

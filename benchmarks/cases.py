"""The cases of inference: one forecast, a segment of forecasts, a feature kept; the sizes and what cases share."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import folded_rows, folded_sum, kan_eager, published_eager
from benchmarks.clock import Clock, Run
from benchmarks.harness import COPY, Case, Variant, sets_needed
from lesa_kernels.ops import TOLERANCES, Tolerance, reference
from lesa_kernels.predictors.kan import KAN, KANLinear

EAGER = "published eager form"
COMPILED = "torch.compile of the folded sum"
COMPILED_EAGER = "torch.compile of the published form"
COMPILED_ROWS = "torch.compile of the folded rows"
ADDITION = "torch.add of two of the features"
INTO = "lesa::forecast_into, memory that is there"
ALL_THREADS = "lesa::forecast_into, all threads"
ONE_THREAD = "lesa::forecast_into, one thread"
TUNED = ", max-autotune"
"""Ends the name of what is compiled with `mode="max-autotune-no-cudagraphs"`; graphs are captured of both."""
KAN_WIDTHS = (51, 256, 256, 1)

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


@torch.no_grad()
def predict_case(
    size: str,
    clock: Clock,
    count: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    small: bool = False,
    published: bool = True,
) -> Case:
    """One forecast of K features, slots of a ring: into fresh memory, and into the slot after them.

    `small` adds an addition, to tell what a call costs apart from its work. `published` adds the authors' form, which
    at video sizes wants more memory than machines have.
    """
    shape, device = SIZES[size], clock.device
    moved = (count + 1) * math.prod(shape) * dtype.itemsize
    sets = sets_needed(moved, clock.cache_bytes())
    rings = [torch.stack(features) for features in random_features(shape, count + 1, dtype, sets, device)]
    history = [list(ring[:count]) for ring in rings]
    weight, bias = (torch.randn(length, device=device) for length in (count, 1))
    layers = [layer for layer in KAN(KAN_WIDTHS).to(device).layers if isinstance(layer, KANLinear)]
    level = 2 * torch.rand(1, KAN_WIDTHS[0], device=device) - 1
    gain = kan_eager(level, layers).reshape(1)
    coefficients, offset = gain * weight, (gain * bias).reshape(())
    coefficients[-1] += 1
    exact = TOLERANCES[dtype]

    def at(turn: int) -> list[Tensor]:
        return history[turn % sets]

    def of(predict: Callable[..., Tensor]) -> Run:
        return lambda turn: [predict(at(turn), weight, bias, gain)]

    def folded(sum_: Callable[..., Tensor]) -> Run:
        return lambda turn: [sum_(at(turn), coefficients, offset)]

    def into(turn: int) -> list[Tensor]:
        ring = rings[turn % sets]
        torch.ops.lesa.forecast_into(ring, coefficients[None], offset[None], range(count), [count])
        return [ring[count]]

    def with_network(turn: int) -> list[Tensor]:
        return [published_eager(at(turn), weight, bias, kan_eager(level, layers).reshape(1))]

    variants = [
        *(Variant(f"{name}predict", of(ops.predict), exact) for name, ops in implementations(device).items()),
        Variant(INTO, into, exact),
        *compiled(COMPILED, folded_sum, folded, exact, device, tuned=True),
    ]
    if published:
        rounded = half_rounded(dtype)
        variants += [
            Variant(EAGER, of(published_eager), rounded),
            Variant(f"{EAGER} with its KAN", with_network, rounded),
            *compiled(COMPILED_EAGER, published_eager, of, rounded, device),
        ]
    if small:
        variants.append(Variant(ADDITION, lambda turn: [torch.add(*at(turn)[:2])], None))
    wide = [tensor.to(wider(dtype)) for tensor in (*map(ends, at(0)), weight, bias, gain)]
    return Case(
        "predict",
        f"{size}, K={count}, {dtype_name(dtype)}",
        moved,
        [reference.predict(wide[:count], *wide[count:])],
        [reference.predict([tensor.abs() for tensor in wide[:count]], *(tensor.abs() for tensor in wide[count:]))],
        [*variants, copy_variant(moved, sets, device)],
        checked=ends,
        sets=sets,
    )


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

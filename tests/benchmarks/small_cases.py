"""Every case of the benchmark, at sizes that take no time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from fake_clocks import ORIGIN

from benchmarks import cases, harness, results
from benchmarks.bench_forecast import forecast_case, push_case, spectrum_case, taylor_case, threads_case
from benchmarks.bench_gram import gram_case
from benchmarks.bench_kan import kan_case
from benchmarks.bench_memory import ceiling_case, pages_case
from benchmarks.bench_predict import predict_backward_case, predict_case, predict_l1_case, training_step_case
from benchmarks.clock import CpuClock
from benchmarks.suite import suite
from benchmarks.sweeps import elements_case, rows_case

Make = Callable[[CpuClock], harness.Case]
MAKERS: dict[str, Make] = {
    "predict": lambda clock: predict_case("tiny", clock, count=3),
    "predict, larger than its pool": lambda clock: predict_case("long", clock, count=2, published=False),
    "predict, float32": lambda clock: predict_case("tiny", clock, count=3, dtype=torch.float32),
    "forecast, float16": lambda clock: forecast_case("tiny", clock, count=3, rows=2, dtype=torch.float16),
    "TaylorSeer segment": lambda clock: taylor_case("tiny", clock, rows=2),
    "Spectrum segment": lambda clock: spectrum_case("tiny", clock, rows=2),
    "ceiling": lambda clock: replace(ceiling_case(clock), variants=[cases.copy_variant(64, 1, clock.device)]),
    "fresh pages": lambda clock: pages_case("tiny", clock),
    "fresh pages, huge ones": lambda clock: pages_case("two huge pages", clock, torch.float32),
    "threads": lambda clock: threads_case("tiny", clock, count=3, cold=False),
    "elements": lambda clock: elements_case(64, clock),
    "rows": lambda clock: rows_case("tiny", clock, count=3, rows=4, op="rows"),
    "push": lambda clock: push_case("tiny", clock),
    "predict_l1": lambda clock: predict_l1_case("tiny", clock, count=3),
    "predict_l1, float32": lambda clock: predict_l1_case("tiny", clock, count=3, dtype=torch.float32),
    "predict_backward": lambda clock: predict_backward_case("tiny", clock, count=3),
    "gram": lambda clock: gram_case("tiny", clock, count=3),
    "training step": lambda clock: training_step_case("tiny", clock, count=3),
    "kan_linear": lambda clock: kan_case(2, clock),
}
# What the suite measures and nothing above makes.
MAKERS.update(
    {
        entry.op: partial(entry.make.func, "tiny")
        for entry in suite(torch.device("cpu"))
        if entry.op not in MAKERS and isinstance(entry.make, partial)
    }
)


def measured_all(case: harness.Case, clock: CpuClock, repeats: int) -> list[results.Measurement]:
    """Measure a case of which nothing may be dropped."""
    dropped: list[harness.Dropped] = []
    rows = harness.measure(case, clock, repeats, ORIGIN, dropped.append)
    assert dropped == []
    return rows

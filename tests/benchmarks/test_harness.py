"""The gate, the clocks and the order of the samples; figures are not tested."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_clocks import ORIGIN, FakeCuda, Scripted, WithGraphs, case_of
from small_cases import measured_all

from benchmarks import harness, results
from benchmarks.baselines import published_eager
from benchmarks.clock import CpuClock, CudaClock, Run, clock_for
from lesa_kernels.ops import Tolerance


def test_a_wrong_variant_is_never_timed_and_the_others_are() -> None:
    dropped: list[harness.Dropped] = []

    def fail(turn: int) -> list[torch.Tensor]:
        raise RuntimeError("no  such\nkernel")

    wrong = harness.Variant("lesa::wrong", lambda turn: [torch.ones(4)], Tolerance(0.01, 0.0))
    right = harness.Variant("right", lambda turn: [torch.full((4,), 0.5)], Tolerance(0.01, 0.0))
    failing = harness.Variant("failing", fail, Tolerance(0.01, 0.0))
    rows = harness.measure(case_of(0.5, wrong, failing, right), Scripted(), 3, ORIGIN, dropped.append)
    assert [row.variant for row in rows] == ["right"]
    first, second = dropped
    assert (first.variant, first.wrong, first.ours) == ("lesa::wrong", True, True)
    assert "predict at 4: output 0 of lesa::wrong must match the reference, it is off by 4.9" in first.dropped
    assert second == harness.Dropped("predict", "4", "failing", "RuntimeError: no such kernel")
    clock = Scripted()
    assert harness.measure(case_of(0.5, wrong), clock, 3, ORIGIN, dropped.append) == [] and clock.asked == []


def test_a_nan_does_not_pass() -> None:
    broken = harness.Variant("broken", lambda turn: [torch.full((4,), torch.nan)], Tolerance(0.01, 0.01))
    with pytest.raises(ValueError, match="broken"):
        harness.check(case_of(1.0, broken), broken)


def test_what_an_earlier_run_wrote_does_not_pass() -> None:
    kept = torch.ones(4)
    idle = harness.Variant("idle", lambda turn: [kept], Tolerance(0.01, 0.01))
    with pytest.raises(ValueError, match="idle"):
        harness.check(case_of(1.0, idle), idle)


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Scripted()
    slow = harness.Variant("slow", lambda turn: [torch.full((4,), 2.0)], Tolerance(1, 1))
    copy = harness.Variant(harness.COPY, lambda turn: [torch.tensor(100.0)], None)
    rows = measured_all(case_of(2.0, slow, copy), clock, 3)
    assert clock.asked[:2] == [1, 1] and set(clock.asked[2:]) == {4, 1}
    assert [row.median_s for row in rows] == [2, 100] and rows[0].share_of_copy == 50


def test_variants_are_captured_and_compared_with_the_faster_copy() -> None:
    clock, dropped = WithGraphs(), list[harness.Dropped]()
    # A sample takes 8 seconds: 4 calls of 2 seconds, with 3 input sets a graph of 6.
    slow = harness.Variant("slow", lambda turn: [torch.full((4,), 2.0)], Tolerance(1, 1))
    alone = replace(slow, name="alone", capture=False, both_modes=False)
    copy = harness.Variant(harness.COPY, lambda turn: [torch.tensor(4.0)], None)
    origin = ORIGIN._replace(device="NVIDIA H200")
    case = replace(case_of(2.0, slow, alone, copy), moved_bytes=96 * 10**11, sets=3)
    rows = {row.variant: row for row in harness.measure(case, clock, 3, origin, dropped.append)}
    assert clock.captured == [(3, 6), (3, 3)] and dropped == []
    assert list(rows) == ["slow", "alone", harness.COPY, "slow, captured", f"{harness.COPY}, captured"]
    assert rows["slow, captured"].median_s == pytest.approx(0.2) and rows["slow"].share_of_peak == 1
    assert [rows[name].share_of_copy for name in ("slow", "slow, captured")] == pytest.approx([0.2, 2])
    hosts = {name: (row.host_no_grad_us, row.host_inference_us) for name, row in rows.items()}
    assert hosts["slow"] == (1e6, 1e6) and hosts["alone"] == (None, 1e6) and hosts["slow, captured"] == (None, None)
    assert results.table(list(rows.values())).row_count == 5


def test_a_capture_that_fails_or_is_wrong_drops_itself() -> None:
    class Failing(WithGraphs):
        def capture(self, run: Run, sets: int, calls: int) -> Run | None:
            if not self.captured:
                self.captured.append((sets, calls))
                raise RuntimeError("operation not permitted when stream is capturing")
            return lambda turn: [torch.zeros(4)]

    dropped: list[harness.Dropped] = []
    one, two = (harness.Variant(name, lambda turn: [torch.ones(4)], Tolerance(0.1, 0)) for name in ("one", "lesa::two"))
    rows = harness.measure(case_of(1.0, one, two), Failing(), 3, ORIGIN, dropped.append)
    assert [row.variant for row in rows] == ["one", "lesa::two"]
    assert [(each.variant, each.wrong) for each in dropped] == [("one, captured", False), ("lesa::two, captured", True)]


def test_after_the_deadline_only_what_matters_is_timed() -> None:
    dropped: list[harness.Dropped] = []
    variants = [
        harness.Variant(name, lambda turn: [torch.ones(4)], None if name == harness.COPY else Tolerance(1, 1))
        for name in ("lesa::predict", "torch.compile of it", harness.COPY)
    ]
    rows = harness.measure(case_of(1.0, *variants), Scripted(), 30, ORIGIN, dropped.append, deadline=0.0)
    assert [row.variant for row in rows] == ["lesa::predict", harness.COPY]
    assert [each.variant for each in dropped] == ["torch.compile of it"]


def test_inputs_rotate_through_several_times_the_cache() -> None:
    assert harness.sets_needed(10, 100) == 40
    assert harness.sets_needed(1000, 100) == 1
    assert harness.sets_needed(1, 10**9) == harness.MOST_SETS


def test_a_device_without_a_clock_is_refused() -> None:
    assert clock_for(torch.device("cpu")).sample(lambda turn: turn, 3, 2) > 0
    with pytest.raises(ValueError, match="type cpu or cuda, got meta"):
        clock_for(torch.device("meta"))


def test_a_gpu_clock_keeps_as_many_outputs_as_there_are_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, alive = FakeCuda(), list[weakref.ref[torch.Tensor]]()
    cuda.install(monkeypatch)
    most = 0

    def run(turn: int) -> list[torch.Tensor]:
        nonlocal most
        outputs = cuda.run(turn)
        alive.append(weakref.ref(outputs[0]))
        most = max(most, sum(output() is not None for output in alive))
        return outputs

    clock = CudaClock(torch.device("cuda"))
    assert clock.sample(run, 5, 10, sets=3) == pytest.approx(2e-3) and cuda.calls == 11
    assert most == 4  # the allocator hands out what is not among these
    replay = clock.capture(cuda.run, 3, 6)
    # Of the last six calls, three are kept; the oldest of them has input set 0.
    assert replay is not None and cuda.calls == 11 + 1 + 6
    assert replay(7)[0][0] == 3 and cuda.replays == 1 and cuda.calls == 18
    assert 0 < (clock.host_seconds(cuda.run) or 0) < 1 and cuda.calls == 18 + 45


def test_a_capture_that_fails_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    cuda.install(monkeypatch)
    before = cuda.current

    def run(turn: int) -> list[torch.Tensor]:
        if cuda.calls:
            raise RuntimeError("operation not permitted when stream is capturing")
        return cuda.run(turn)

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaClock(torch.device("cuda")).capture(run, 1, 1)
    assert cuda.current is before


def test_memory_beyond_the_inputs_is_counted() -> None:
    clock, features = CpuClock(), [torch.randn(1000) for _ in range(3)]
    ring, coefficients, offsets = torch.randn(5, 1000), torch.randn(2, 3), torch.randn(2)
    ops = torch.ops.lesa

    def quiet(call: Callable[[], object]) -> Run:
        def run(turn: int) -> list[torch.Tensor]:
            call()
            return []

        return run

    # A forecast is made where it is to lie, a feature kept where it is kept.
    assert clock.extra_bytes(quiet(lambda: ops.forecast_into(ring, coefficients, offsets, [0, 1, 2], [3, 4]))) == 0
    assert clock.extra_bytes(quiet(lambda: ops.push(ring, features[0], 2))) == 0
    assert clock.extra_bytes(lambda turn: ops.forecast(features, coefficients, offsets)) == 2 * 4000
    stacked = clock.extra_bytes(lambda turn: [published_eager(features, torch.ones(3), torch.ones(1), torch.ones(1))])
    assert stacked > 4 * 4000


def test_a_variant_can_ask_for_threads() -> None:
    before, seen = torch.get_num_threads(), list[int]()

    def run(turn: int) -> list[torch.Tensor]:
        seen.append(torch.get_num_threads())
        return []

    case = case_of(1.0, harness.Variant("one", run, None, threads=1), harness.Variant("as it was", run, None))
    harness.one_round(case, CpuClock(), {"one": 1, "as it was": 1}, 0)
    assert seen == [1, 1, before, before] and torch.get_num_threads() == before


def test_a_case_without_bytes_has_no_bandwidth(tmp_path: Path) -> None:
    case = replace(case_of(1.0, harness.Variant("x", lambda turn: [torch.ones(4)], None)), moved_bytes=None)
    rows = harness.rows_of(case, [{"x": 1.0}, {"x": 2.0}], {"x": harness.Known(1)}, ORIGIN)
    assert rows[0].gb_per_s is None and rows[0].share_of_copy is None
    results.save(rows, tmp_path / "rows.csv")
    assert results.load(tmp_path / "rows.csv") == rows and results.table(rows).row_count == 1


def test_variants_take_turns_in_going_first() -> None:
    seen: list[str] = []

    def variant(name: str) -> harness.Variant:
        def run(turn: int) -> list[torch.Tensor]:
            seen.append(name)
            return [torch.tensor(1.0)]

        return harness.Variant(name, run, None)

    case, clock = case_of(1.0, *map(variant, "abc")), Scripted()
    for turn in range(3):
        harness.one_round(case, clock, dict.fromkeys("abc", 1), turn)
    assert "".join(seen) == "abcbcacab"

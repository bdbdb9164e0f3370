"""The benchmark's gate, its clock and its bookkeeping; its figures are not tested."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import __main__ as command
from benchmarks import cases, compare, dispatch, harness, results, suite, targets
from benchmarks.baselines import folded_sum, kan_eager, published_eager, published_l1
from benchmarks.bench_forecast import forecast_case, push_case, spectrum_case, taylor_case, threads_case
from benchmarks.bench_gram import gram_case
from benchmarks.bench_identity import identity_case
from benchmarks.bench_kan import kan_by_ops, kan_case
from benchmarks.bench_predict import predict_backward_case, predict_case, predict_l1_case, training_step_case
from benchmarks.clock import CpuClock, CudaClock, Run, clock_for
from benchmarks.memory import ceiling_case, pages_case
from benchmarks.predictions import predictions
from benchmarks.sweeps import elements_case, rows_case
from lesa_kernels.ops import Tolerance
from lesa_kernels.predictors.kan_network import KAN

ORIGIN = results.Origin("a device", 1, "2.13", "", "abc", "2026-01-01", "test")


class SmallCache(CpuClock):
    def cache_bytes(self) -> int:
        return 1


class Scripted(SmallCache):
    """A call takes as many seconds as its name says; what was asked for is written down."""

    sample_seconds = 8.0

    def __init__(self) -> None:
        self.asked: list[int] = []

    def sample(self, run: Run, first: int, calls: int, sets: int = 1) -> float:
        self.asked.append(calls)
        return float(run(first)[0].view(-1)[0])


class WithGraphs(Scripted):
    """Has graphs, which take a tenth of the time a call, and a host that needs a second to launch."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[tuple[int, int]] = []

    def capture(self, run: Run, sets: int, calls: int) -> Run | None:
        self.captured.append((sets, calls))
        return lambda turn: [output * calls / 10 for output in run(0)]

    def host_seconds(self, run: Run) -> float | None:
        return 1.0


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.SIZES, "tiny", (3, 5))
    monkeypatch.setitem(cases.SIZES, "two huge pages", (2**20,))
    monkeypatch.setitem(cases.SIZES, "long", (9, 5))
    monkeypatch.setattr(cases, "POOL", 20)
    monkeypatch.setattr(cases, "CHECKED", 20)


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
    "identity": lambda clock: identity_case("tiny", clock),
    "predict_l1": lambda clock: predict_l1_case("tiny", clock, count=3),
    "predict_l1, float32": lambda clock: predict_l1_case("tiny", clock, count=3, dtype=torch.float32),
    "predict_backward": lambda clock: predict_backward_case("tiny", clock, count=3),
    "gram": lambda clock: gram_case("tiny", clock, count=3),
    "training step": lambda clock: training_step_case("tiny", clock, count=3),
    "kan_linear": lambda clock: kan_case(2, clock),
}


@pytest.fixture(params=list(MAKERS))
def make(request: pytest.FixtureRequest) -> Make:
    torch.compiler.reset()
    return MAKERS[request.param]


def test_every_variant_passes_the_gate_and_is_measured(make: Make, tmp_path: Path) -> None:
    case = make(SmallCache())
    rows = _measured_all(case, SmallCache(), 3)
    assert [row.variant for row in rows] == [variant.name for variant in case.variants]
    assert next(row for row in rows if row.variant == harness.COPY).share_of_copy == 1
    assert all(0 < row.p20_s <= row.median_s <= row.p80_s for row in rows)
    assert results.table(rows).row_count == len(rows)
    results.save(rows, tmp_path / "results.csv")
    assert results.load(tmp_path / "results.csv") == rows
    committed = {_whose(row) for row in results.load(command.RESULTS) if row.op == case.op}
    ours = {_whose(row) for row in rows if harness.is_ours(row.variant)}
    assert ours <= committed or not committed, f"run python -m benchmarks --op '{case.op}' --save"


def _measured_all(case: harness.Case, clock: CpuClock, repeats: int) -> list[results.Measurement]:
    """Measure a case of which nothing may be dropped."""
    dropped: list[harness.Dropped] = []
    rows = harness.measure(case, clock, repeats, ORIGIN, dropped.append)
    assert dropped == []
    return rows


def _whose(row: results.Measurement) -> str:
    """Return the variant, whatever the number of its calls."""
    return re.sub(r"^\d+ x ", "M x ", row.variant)


def test_the_gate_sees_each_output_of_each_variant(make: Make) -> None:
    case = make(SmallCache())
    gated = [variant for variant in case.variants if variant.tolerance is not None]
    assert len(case.variants) - len(gated) == sum(variant.name.startswith(harness.COPY) for variant in case.variants)
    for variant in gated:
        for number in range(len(case.reference)):

            def off_by_a_tenth(turn: int, run: Run = variant.run, number: int = number) -> list[torch.Tensor]:
                outputs = [output.clone() for output in run(turn)]
                outputs[number].view(-1)[-1] += 0.1 * case.scale[number].max()
                return outputs

            broken = replace(variant, run=off_by_a_tenth)
            with case.context(), pytest.raises(ValueError, match=f"output {number} of {re.escape(variant.name)} must"):
                harness.check(case, broken)


def _case(value: float, *variants: harness.Variant) -> harness.Case:
    return harness.Case("predict", "4", 16, [torch.full((4,), value)], [torch.ones(())], variants)


def test_a_wrong_variant_is_never_timed_and_the_others_are() -> None:
    dropped: list[harness.Dropped] = []

    def fail(turn: int) -> list[torch.Tensor]:
        raise RuntimeError("no  such\nkernel")

    wrong = harness.Variant("lesa::wrong", lambda turn: [torch.ones(4)], Tolerance(0.01, 0.0))
    right = harness.Variant("right", lambda turn: [torch.full((4,), 0.5)], Tolerance(0.01, 0.0))
    failing = harness.Variant("failing", fail, Tolerance(0.01, 0.0))
    rows = harness.measure(_case(0.5, wrong, failing, right), Scripted(), 3, ORIGIN, dropped.append)
    assert [row.variant for row in rows] == ["right"]
    first, second = dropped
    assert (first.variant, first.wrong, first.ours) == ("lesa::wrong", True, True)
    assert "predict at 4: output 0 of lesa::wrong must match the reference, it is off by 4.9" in first.dropped
    assert second == harness.Dropped("predict", "4", "failing", "RuntimeError: no such kernel")
    clock = Scripted()
    assert harness.measure(_case(0.5, wrong), clock, 3, ORIGIN, dropped.append) == [] and clock.asked == []


def test_a_nan_does_not_pass() -> None:
    broken = harness.Variant("broken", lambda turn: [torch.full((4,), torch.nan)], Tolerance(0.01, 0.01))
    with pytest.raises(ValueError, match="broken"):
        harness.check(_case(1.0, broken), broken)


def test_what_an_earlier_run_wrote_does_not_pass() -> None:
    kept = torch.ones(4)
    idle = harness.Variant("idle", lambda turn: [kept], Tolerance(0.01, 0.01))
    with pytest.raises(ValueError, match="idle"):
        harness.check(_case(1.0, idle), idle)


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Scripted()
    slow = harness.Variant("slow", lambda turn: [torch.full((4,), 2.0)], Tolerance(1, 1))
    copy = harness.Variant(harness.COPY, lambda turn: [torch.tensor(100.0)], None)
    rows = _measured_all(_case(2.0, slow, copy), clock, 3)
    assert clock.asked[:2] == [1, 1] and set(clock.asked[2:]) == {4, 1}
    assert [row.median_s for row in rows] == [2, 100] and rows[0].share_of_copy == 50


def test_variants_are_captured_and_compared_with_the_faster_copy() -> None:
    clock, dropped = WithGraphs(), list[harness.Dropped]()
    # A sample takes 8 seconds: 4 calls of 2 seconds, with 3 input sets a graph of 6.
    slow = harness.Variant("slow", lambda turn: [torch.full((4,), 2.0)], Tolerance(1, 1))
    alone = replace(slow, name="alone", capture=False, both_modes=False)
    copy = harness.Variant(harness.COPY, lambda turn: [torch.tensor(4.0)], None)
    origin = ORIGIN._replace(device="NVIDIA H200")
    case = replace(_case(2.0, slow, alone, copy), moved_bytes=96 * 10**11, sets=3)
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
    rows = harness.measure(_case(1.0, one, two), Failing(), 3, ORIGIN, dropped.append)
    assert [row.variant for row in rows] == ["one", "lesa::two"]
    assert [(each.variant, each.wrong) for each in dropped] == [("one, captured", False), ("lesa::two, captured", True)]


def test_after_the_deadline_only_what_matters_is_timed() -> None:
    dropped: list[harness.Dropped] = []
    variants = [
        harness.Variant(name, lambda turn: [torch.ones(4)], None if name == harness.COPY else Tolerance(1, 1))
        for name in ("lesa::predict", "torch.compile of it", harness.COPY)
    ]
    rows = harness.measure(_case(1.0, *variants), Scripted(), 30, ORIGIN, dropped.append, deadline=0.0)
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


def test_rows_of_older_versions_are_kept(tmp_path: Path) -> None:
    path, facts = tmp_path / "results.csv", {"extra_bytes": 7, "share_of_peak": 0.5, "host_no_grad_us": 3.0}
    row = replace(harness.row_of("predict", "4", "x", [1.0, 2.0, 3.0], ORIGIN, moved_bytes=16, copy=1.0), **facts)
    results.save([row], path)
    with path.open(newline="") as file:
        old = next(csv.DictReader(file))
    for name in (*facts, "host_inference_us"):
        del old[name]
    path.write_text(",".join(old) + "\n" + ",".join(old.values()) + "\n")
    results.save([row], path)
    assert results.load(path) == [replace(row, **dict.fromkeys(facts)), row]
    path.write_text("strange\n1\n")
    with pytest.raises(ValueError, match="got strange"):
        results.save([row], path)


def test_the_committed_results_are_readable() -> None:
    assert len(results.load(command.RESULTS)) > 0


def test_baselines_compute_the_formula() -> None:
    history, target = [torch.randn(4, 6) for _ in range(5)], torch.randn(4, 6)
    weight, bias, gain = torch.randn(5), torch.randn(1), torch.randn(1)
    want = torch.ops.lesa.predict(history, weight, bias, gain)
    torch.testing.assert_close(published_eager(history, weight, bias, gain), want)
    coefficients = gain * weight
    coefficients[-1] += 1
    torch.testing.assert_close(folded_sum(history, coefficients, (gain * bias).reshape(())), want)
    torch.testing.assert_close(published_l1(history, target, weight, bias, gain), (want - target).abs().mean())


def test_layers_called_by_hand_agree_with_autograd() -> None:
    network, x = KAN((4, 6, 2)), torch.randn(3, 4)
    layers = list(network.layers)
    parameters = [
        tensor for layer in layers for tensor in (layer.base_weight, layer.spline_weight, layer.spline_scaler)
    ]
    out = kan_eager(x, layers)
    want = [out, *torch.autograd.grad(out.sum(), parameters)]
    for got, wanted in zip(kan_by_ops(torch.ops.lesa, layers, x), want, strict=True):
        torch.testing.assert_close(got, wanted)


def _measured(target: targets.Target, ratio: float) -> list[results.Measurement]:
    row = harness.row_of(target.op, target.size, target.ours, [1.0], ORIGIN)
    return [row, replace(row, variant=target.against, median_s=ratio)]


def test_targets_are_judged_by_what_was_measured() -> None:
    target = next(targets.targets())
    for ratio, word in ((target.at_least, "met"), (target.at_least * 0.999, "NOT MET")):
        verdicts = targets.judge(_measured(target, ratio))
        assert verdicts[0].word == word and verdicts[0].measured == ratio
        assert {verdict.word for verdict in verdicts[1:]} == {"not measured"}
        assert targets.table(verdicts).row_count == len(verdicts)


def test_a_target_may_be_a_margin() -> None:
    target = targets.Target("predict", "4", "ours", "theirs", within_us=6.0)
    for ours, word in ((105.9e-6, "met"), (106.1e-6, "NOT MET")):
        rows = [replace(row, median_s=seconds) for row, seconds in zip(_measured(target, 1), (ours, 1e-4), strict=True)]
        (verdict,) = targets.judge(rows, [target])
        assert verdict.word == word and "theirs / ours <= +6 us, got" in verdict.line


def test_the_fastest_of_a_rival_counts() -> None:
    target = targets.Target("predict", "4", "ours, captured", "torch.compile, captured", 1.0)
    row = harness.row_of(target.op, target.size, target.ours, [1.0], ORIGIN)
    others = {"torch.compile": 0.9, "torch.compile, max-autotune, captured": 0.8, "torch.compile, captured": 0.95}
    rows = [row, *(replace(row, variant=name, median_s=seconds) for name, seconds in others.items())]
    (verdict,) = targets.judge(rows, [target])
    assert verdict.measured == 0.8 and verdict.against == "torch.compile, max-autotune, captured"
    assert "NOT MET: predict, 4: torch.compile, max-autotune, captured / ours, captured >= 1" in verdict.line


def test_on_a_gpu_a_function_is_also_compiled_with_autotuning() -> None:
    torch.compiler.reset()
    history, coefficients, offset = [torch.randn(64) for _ in range(3)], torch.randn(3), torch.randn(())
    for device, tuned, count in (("cpu", True, 1), ("cuda", False, 1), ("cuda", True, 2)):
        variants = cases.compiled(
            "compiled",
            folded_sum,
            lambda f: lambda turn: [f(history, coefficients, offset)],
            Tolerance(1, 1),
            torch.device(device),
            tuned,
        )
        assert [variant.name for variant in variants] == ["compiled", "compiled, max-autotune"][:count]
        for variant in variants:
            torch.testing.assert_close(variant.run(0)[0], folded_sum(history, coefficients, offset))


def test_predictions_are_times_of_a_copy() -> None:
    found = {(each.device, each.op, each.size): each for each in predictions()}
    ours = found["NVIDIA H200", "predict", "FLUX 1024x1024, K=8, bfloat16"]
    copy = 9 * 4096 * 3072 * 2 / 4.3e6
    assert ours.variant == "lesa::predict, captured"
    assert ours.microseconds == pytest.approx((copy / 1.05, copy / 0.95))


@pytest.mark.parametrize(("device", "wanted"), [("cuda", targets.targets), ("cpu", targets.cpu_targets)])
def test_every_target_names_variants_that_the_suite_measures(
    device: str, wanted: Callable[[], Iterator[targets.Target]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in cases.SIZES:
        monkeypatch.setitem(cases.SIZES, size, (1, 3, 5))
    monkeypatch.setattr(cases, "implementations", lambda device: {"lesa::": torch.ops.lesa})
    measurable = set()
    for entry in suite.suite(torch.device(device)):
        if entry.op == "sampling run":
            continue
        case = entry.make(SmallCache())
        measurable |= {(case.op, case.size, variant.name) for variant in case.variants}
        measurable |= {(case.op, case.size, variant.name + harness.CAPTURED) for variant in case.variants}
    for target in wanted():
        assert {(target.op, target.size, name) for name in (target.ours, target.against)} <= measurable
    if device == "cuda":
        assert {(each.op, each.size, each.variant) for each in predictions()} <= measurable


def test_the_command_measures_and_saves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entries = [suite.Entry(op, MAKERS[op]) for op in ("push", "predict", "push")]
    monkeypatch.setattr(command, "suite", lambda device: entries)
    path = tmp_path / "out.csv"

    app = typer.Typer()
    app.command()(command.main)

    def run(*arguments: str) -> str:
        output = CliRunner().invoke(app, ["--repeats", "3", *arguments]).output
        return " ".join(output.replace("│", " ").split())  # messages stand in boxes

    assert "appended to out.csv" in run("--op", "push", "--save", "--out", str(path))
    assert {row.op for row in results.load(path)} == {"push"} and len(results.load(path)) == 2 * 3
    assert "3 cases left out: 0 seconds are over" in run("--seconds", "0")
    assert "must name an op" in run("--op", "nothing")
    assert "got nothing" in run("--op", "push", "--op", "nothing")
    for device in ("meta", "nowhere", "cuda:63"):
        assert f"--device must be cpu or a GPU that is there, got {device}" in run("--device", device)
    assert "--isa must be one that _cpu was compiled for and this processor runs, got mmx" in run("--isa", "mmx")
    for option in (["--sweep"], ["--save"], ["--seconds", "1"], ["--isa", "avx2"]):
        assert f"{option[0]} and --baseline exclude each other" in run("--baseline", "HEAD", *option)


def test_a_run_says_what_was_wrong_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(clock: CpuClock) -> harness.Case:
        raise RuntimeError("out of memory")

    def wrong(clock: CpuClock) -> harness.Case:
        run = harness.Variant("lesa::predict", lambda turn: [torch.zeros(4)], Tolerance(0, 0))
        return _case(1.0, run, harness.Variant(harness.COPY, lambda turn: [torch.ones(4)], None))

    entries = [suite.Entry("broken", broken), suite.Entry("push", MAKERS["push"])]
    monkeypatch.setattr(command, "headline", lambda device: entries)
    app, lines = typer.Typer(), tmp_path / "lines.jsonl"
    app.command()(command.main)

    def run(*arguments: str) -> tuple[int, list[dict[str, object]]]:
        lines.unlink(missing_ok=True)
        code = CliRunner().invoke(app, ["--headline", "--repeats", "3", "--jsonl", str(lines), *arguments]).exit_code
        return code, [json.loads(line) for line in lines.read_text().splitlines()]

    code, found = run()
    assert code == 0 and len(found) == 4
    assert (found[0]["op"], found[0]["dropped"], found[0]["variant"]) == ("broken", "RuntimeError: out of memory", "")
    assert [line["variant"] for line in found[1:]] == ["lesa::push", "Tensor.copy_", harness.COPY]
    entries.append(suite.Entry("wrong", wrong))
    code, found = run("--part", "2/2")
    assert code == 0 and {line["op"] for line in found} == {"push"}
    code, found = run("--part", "3/3", "--save", "--out", str(tmp_path / "out.csv"))
    assert code == 1 and [(line["variant"], line.get("wrong")) for line in found] == [
        ("lesa::predict", True),
        (harness.COPY, None),
    ]
    assert [row.variant for row in results.load(tmp_path / "out.csv")] == [harness.COPY]
    code, found = run("--only-compile")
    assert code == 0 and [line["op"] for line in found] == ["broken", "push", "push", "push", "predict", "predict"]
    assert all("first_call_s" in line for line in found[1:])
    for part in ("0/2", "3/2", "1", "x/y"):
        assert CliRunner().invoke(app, ["--part", part]).exit_code == 2


class FakeCuda:
    """Stands for the parts of `torch.cuda` that a clock uses: an event knows how many calls came before it."""

    def __init__(self) -> None:
        self.calls = 0
        self.replays = 0
        self.current: object = SimpleNamespace(wait_stream=lambda other: None)

    def run(self, turn: int) -> list[torch.Tensor]:
        self.calls += 1
        return [torch.full((1000,), float(turn))]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0

            def record(inner) -> None:
                inner.at = self.calls

            def synchronize(self) -> None: ...

            def elapsed_time(self, other: Event) -> float:
                return 2.0 * (other.at - self.at)

        class Graph:
            def replay(inner) -> None:
                self.replays += 1

        @contextmanager
        def stream(chosen: object) -> Iterator[None]:
            before, self.current = self.current, chosen
            try:
                yield
            finally:
                self.current = before

        @contextmanager
        def graph(_: Graph, stream: object) -> Iterator[None]:
            before, self.current = self.current, stream
            yield  # an error passes the next line, as it does in torch
            self.current = before

        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": lambda device: SimpleNamespace(wait_stream=lambda other: None),
            "current_stream": lambda device: self.current,
            "stream": stream,
            "graph": graph,
            "synchronize": lambda device: None,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


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

    case = _case(1.0, harness.Variant("one", run, None, threads=1), harness.Variant("as it was", run, None))
    harness.one_round(case, CpuClock(), {"one": 1, "as it was": 1}, 0)
    assert seen == [1, 1, before, before] and torch.get_num_threads() == before


def test_a_case_without_bytes_has_no_bandwidth(tmp_path: Path) -> None:
    case = replace(_case(1.0, harness.Variant("x", lambda turn: [torch.ones(4)], None)), moved_bytes=None)
    rows = harness.rows_of(case, [{"x": 1.0}, {"x": 2.0}], {"x": harness.Known(1)}, ORIGIN)
    assert rows[0].gb_per_s is None and rows[0].share_of_copy is None
    results.save(rows, tmp_path / "rows.csv")
    assert results.load(tmp_path / "rows.csv") == rows and results.table(rows).row_count == 1


def test_sampling_with_a_fifth_of_the_calls_is_measured() -> None:
    pytest.importorskip("diffusers", reason="the sampling run drives a diffusers model")
    from benchmarks.sampling import ACCELERATED, PLAIN, sampling_case

    case = sampling_case(1, CpuClock(), steps=12)
    rows = _measured_all(case, CpuClock(), 3)
    assert [row.variant for row in rows][:2] == [ACCELERATED, PLAIN]


def test_two_commits_are_compared_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "BUILD", tmp_path)
    kan = next(number for number, entry in enumerate(suite.suite(torch.device("cpu"))) if entry.op == "kan_linear")
    with compare.Worker(compare.ROOT, "cpu") as base, compare.Worker(compare.ROOT, "cpu") as here:
        title, rows = compare.compare(base, here, kan, repeats=3)
        assert not isinstance(rows, str), rows
        assert title.startswith("kan_linear at") and [len(row.base) for row in rows] == [3] * len(rows)
        assert {row.variant for row in rows} >= {"lesa::kan_linear and autograd", harness.COPY}
        assert compare.table(title, rows).row_count == len(rows)
    (tmp_path / "empty").mkdir()
    with compare.Worker(tmp_path / "empty", "cpu") as base, pytest.raises(RuntimeError, match="do not run on empty"):
        base.ask(open=0)


def test_two_commits_take_turns_in_going_first() -> None:
    asked: list[str] = []

    class Fake(compare.Worker):
        def __init__(self, name: str, seconds: float) -> None:
            self.name, self.seconds = name, seconds

        def ask(self, **request: object) -> object:
            if "open" in request:
                return {"title": "a case", "variants": ["x", self.name]}
            asked.append(f"{self.name} {request['round']}")
            return {"x": 100.0 if request["round"] == 0 else self.seconds, self.name: 1.0}

    title, rows = compare.compare(Fake("base", 3.0), Fake("here", 1.5), 0, repeats=2)
    assert asked == ["here 0", "base 0", "base 1", "here 1", "here 2", "base 2"]
    assert title == "a case" and rows == [compare.Compared("x", [3.0, 3.0], [1.5, 1.5])]
    assert list(compare.table(title, rows).columns[-1].cells) == ["2.00"]  # times as fast


def test_variants_take_turns_in_going_first() -> None:
    seen: list[str] = []

    def variant(name: str) -> harness.Variant:
        def run(turn: int) -> list[torch.Tensor]:
            seen.append(name)
            return [torch.tensor(1.0)]

        return harness.Variant(name, run, None)

    case, clock = _case(1.0, *map(variant, "abc")), Scripted()
    for turn in range(3):
        harness.one_round(case, clock, dict.fromkeys("abc", 1), turn)
    assert "".join(seen) == "abcbcacab"


def test_a_commit_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="--baseline must name a commit, got nothing-like-it"):
        compare.checked_out("nothing-like-it", "cpu", Console())


def _repository(folder: Path, *names: str) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments], cwd=folder, check=True)

    git("init", "--quiet")
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    git("add", *names)
    git("commit", "--quiet", "-m", "x")


def test_results_of_an_earlier_run_do_not_make_a_commit_dirty(tmp_path: Path) -> None:
    assert results.commit(tmp_path) == "unknown"
    _repository(tmp_path, "setup.py", "benchmarks/results.csv")
    clean = results.commit(tmp_path / "benchmarks")
    (tmp_path / "benchmarks/results.csv").write_text("a row")
    assert results.commit(tmp_path / "benchmarks") == clean
    (tmp_path / "setup.py").write_text("something else")
    assert results.commit(tmp_path / "benchmarks") == f"{clean}-dirty"


def test_a_checkout_that_was_deleted_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _repository(tmp_path, "setup.py")
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "BUILD", tmp_path / "build")
    for _ in range(2):
        assert (compare.checked_out("HEAD", "cpu", Console()) / "setup.py").exists()
        shutil.rmtree(tmp_path / "build")


def test_the_host_time_of_every_mode_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        dispatch.main(samples=3)
    finally:
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    for op in dispatch.calls():
        (line,) = [line for line in lines if line.startswith(f"│ {op} ")]
        assert len(re.findall(r"\d+\.\d", line)) == len(dispatch.MODES)

"""Every case of the benchmark: its variants pass the gate, its baselines compute the formula."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_clocks import SmallCache
from small_cases import MAKERS, Make, measured_all

from benchmarks import __main__ as command
from benchmarks import cases, dispatch, harness, results
from benchmarks.baselines import folded_sum, kan_eager, published_eager, published_l1
from benchmarks.bench_kan import kan_by_ops
from benchmarks.clock import CpuClock, Run
from lesa_kernels.ops import Tolerance
from lesa_kernels.predictors.kan_network import KAN


@pytest.fixture(params=list(MAKERS))
def make(request: pytest.FixtureRequest) -> Make:
    torch.compiler.reset()
    return MAKERS[request.param]


def test_every_variant_passes_the_gate_and_is_measured(make: Make, tmp_path: Path) -> None:
    case = make(SmallCache())
    rows = measured_all(case, SmallCache(), 3)
    assert [row.variant for row in rows] == [variant.name for variant in case.variants]
    assert next(row for row in rows if row.variant == harness.COPY).share_of_copy == 1
    assert all(0 < row.p20_s <= row.median_s <= row.p80_s for row in rows)
    assert results.table(rows).row_count == len(rows)
    results.save(rows, tmp_path / "results.csv")
    assert results.load(tmp_path / "results.csv") == rows
    committed = {_whose(row) for row in results.load(command.RESULTS) if row.op == case.op}
    ours = {_whose(row) for row in rows if harness.is_ours(row.variant)}
    assert ours <= committed or not committed, f"run python -m benchmarks --op '{case.op}' --save"


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


def test_sampling_with_a_fifth_of_the_calls_is_measured() -> None:
    pytest.importorskip("diffusers", reason="the sampling run drives a diffusers model")
    from benchmarks.sampling import ACCELERATED, PLAIN, sampling_case

    case = sampling_case(1, CpuClock(), steps=12)
    rows = measured_all(case, CpuClock(), 3)
    assert [row.variant for row in rows][:2] == [ACCELERATED, PLAIN]


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

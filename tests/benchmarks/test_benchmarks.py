"""The benchmark's gate and its bookkeeping; its figures are not tested."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import cases, harness
from benchmarks.baselines import folded_sum, published_eager


def test_every_variant_passes_the_gate_and_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(cases.SIZES, "tiny", (3, 5))
    monkeypatch.setattr(cases, "sets_needed", lambda size: 2)
    for make in (cases.predict_case, cases.forecast_case):
        case = make("tiny", count=3, dtype=torch.bfloat16)
        rows = harness.measure(case, repeats=3, command="test")
        assert [row.variant for row in rows] == [variant.name for variant in case.variants]
        assert all(0 < row.p20_s <= row.median_s <= row.p80_s for row in rows)
        assert harness.table(rows).row_count == len(rows)
        harness.save(rows, tmp_path / "results.csv")
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].startswith("op,size,variant,median_s") and len(lines) == 1 + 4 + 5


def test_a_wrong_variant_is_never_timed() -> None:
    wrong = harness.Variant("wrong", lambda turn: [torch.ones(4)])
    case = harness.Case("predict", "4", 16, [torch.zeros(4) + 0.5], 0.01, [wrong])
    with pytest.raises(ValueError, match=r"predict at 4: wrong must be within 0\.01 of the reference, got 1\.00e\+00"):
        harness.measure(case, 3, "test")


def test_a_nan_does_not_pass() -> None:
    broken = harness.Variant("broken", lambda turn: [torch.full((4,), torch.nan)])
    with pytest.raises(ValueError, match="broken"):
        harness.check(harness.Case("predict", "4", 16, [torch.ones(4)], 0.01, [broken]))


def test_baselines_compute_the_formula() -> None:
    history = [torch.randn(4, 6) for _ in range(5)]
    weight, bias, gain = torch.randn(5), torch.randn(1), torch.randn(1)
    want = torch.ops.lesa.predict(history, weight, bias, gain)
    torch.testing.assert_close(published_eager(history, weight, bias, gain), want)
    coefficients = gain * weight
    coefficients[-1] += 1
    torch.testing.assert_close(folded_sum(history, coefficients, (gain * bias).reshape(())), want)

"""Targets and predictions are judged by what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from fake_clocks import ORIGIN, SmallCache

from benchmarks import cases, harness, results, suite, targets
from benchmarks.predictions import predictions


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

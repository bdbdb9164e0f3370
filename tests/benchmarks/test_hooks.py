"""The benchmark of the hooks measures what it says it measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lesa_kernels as lesa
from benchmarks import hooks, results


def test_each_cached_step_is_measured_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooks.build_model()
    assert len(model.transformer_blocks) + len(model.single_transformer_blocks) == 57
    schedule = lesa.Schedule.explicit(hooks.STEPS, hooks.FULL)
    with lesa.enabled(model, lesa.TaylorSeer(2), schedule, sigmas=hooks.SIGMAS):
        cached, tails = hooks.measure(model, 1)
        assert len(cached) == len(tails) == hooks.STEPS - len(hooks.FULL)
        assert lesa.summary(model).skipped_blocks == 57 * len(cached)
        monkeypatch.setattr(hooks, "scaled_tail", lambda model, feature, **_: (torch.zeros(1, 1, 4),))
        with pytest.raises(AssertionError, match="not close"):
            hooks.measure(model, 1)


def test_what_is_beyond_the_tail_can_be_saved(tmp_path: Path) -> None:
    hooks.main(runs=1, save=True, out=tmp_path / "rows.csv")
    rows = results.load(tmp_path / "rows.csv")
    assert [row.variant for row in rows] == ["FLUX, beyond the tail", "any model, beyond the tail"]
    assert {row.op for row in rows} == {"cached step"} and all(0 < row.median_s < 0.1 for row in rows)

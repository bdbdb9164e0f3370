"""The benchmark of the hooks measures what it says it measures."""

from __future__ import annotations

import pytest
import torch

import lesa_kernels as lesa
from benchmarks import hooks


def test_each_cached_step_is_measured_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooks.build_model()
    assert len(model.transformer_blocks) + len(model.single_transformer_blocks) == 57
    schedule = lesa.Schedule.explicit(hooks.STEPS, hooks.FULL)
    with lesa.enabled(model, lesa.TaylorSeer(2), schedule, sigmas=hooks.SIGMAS):
        cached, tails = hooks.measure(model, 1)
        assert len(cached) == len(tails) == hooks.STEPS - len(hooks.FULL)
        assert lesa.summary(model).skipped_blocks == 57 * len(cached)
        monkeypatch.setattr(hooks, "flux_tail", lambda model, feature, **_: (torch.zeros(1, 1, 4),))
        with pytest.raises(AssertionError, match="not close"):
            hooks.measure(model, 1)

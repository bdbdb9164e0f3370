"""The solvers of the digits model, which have no cache."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: demo)")

from examples.digits.model import initial_noise, load_model, sample, scheduler, set_up
from examples.digits.solvers import solve

LABELS = torch.arange(4)


def test_euler_over_all_steps_is_the_scheduler() -> None:
    model, noise = load_model(), initial_noise(4, seed=5)
    sigmas = set_up(scheduler(), 12).tolist()
    torch.testing.assert_close(
        solve(model, noise, LABELS, sigmas, 1), sample(model, noise, LABELS, 12), rtol=1e-4, atol=1e-4
    )


def test_the_second_order_solver_converges_faster() -> None:
    model, noise = load_model(), initial_noise(4, seed=5)

    def at(steps: int, order: Literal[1, 2]) -> torch.Tensor:
        return solve(model, noise, LABELS, set_up(scheduler(), steps).tolist(), order)

    fine = at(120, 2)
    assert (at(30, 2) - fine).norm() < 0.5 * (at(30, 1) - fine).norm()

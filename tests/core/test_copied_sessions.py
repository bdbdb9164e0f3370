"""Copies and pickles of plans, predictors and of a session in the middle of a run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lesa_kernels as lesa

STEPS = 12
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
SCHEDULE = lesa.Schedule.explicit(STEPS, (0, 1, 2, 3, 7))
WAYS: list[Callable[[Any], Any]] = [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))]
PREDICTORS = [lesa.Reuse(), lesa.TaylorSeer(2), lesa.LesaPredictor(STEPS)]


def goes_on(session: lesa.Session, first: int) -> list[Tensor]:
    results = []
    for step in range(first, STEPS):
        if session.plan.is_full(step):
            session.push(step, torch.full((2, 6, 8), float(step)))
        else:
            results.append(session.forecast(step).clone())
    return results


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda predictor: type(predictor).__name__)
@pytest.mark.parametrize("history", [{}, {"history_dtype": torch.bfloat16}], ids=str)
def test_a_copied_session_goes_on_from_where_it_was(
    way: Callable[[Any], Any], predictor: lesa.Predictor, history: dict[str, Any]
) -> None:
    plan = predictor.plan(SIGMAS, SCHEDULE)
    assert way(plan) == plan
    assert way(predictor).plan(SIGMAS, SCHEDULE) == plan
    session = lesa.Session(plan, **history)
    for step in range(5):
        if plan.is_full(step):
            session.push(step, torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(step)))
        else:
            session.forecast(step)
    other = way(session)
    want = goes_on(session, 5)
    got = goes_on(other, 5)
    assert want and all(map(torch.equal, got, want))

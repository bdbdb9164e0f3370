"""Histories of int8 and float8: what a session gives with them, what they take, what they refuse."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lesa_kernels import Forecaster, LesaPredictor, Plan, Reuse, Schedule, Session, TaylorSeer
from lesa_kernels.reference import scale_rows, unscaled

STEPS = 20
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
INTERVAL = Schedule.interval(STEPS, 5)
# Half a unit where the largest element of a row lies, by that element: what rounding to the dtype costs at most.
HALF_UNIT = {torch.int8: 0.5 / 127, torch.float8_e4m3fn: 2.0**-4}
DTYPES = pytest.mark.parametrize("dtype", HALF_UNIT, ids=str)


def _run(session: Session, features: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield the forecasts of a run."""
    for step, feature in enumerate(features):
        if session.plan.is_full(step):
            session.push(step, feature)
        else:
            yield step, session.forecast(step)


def _largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(-1, keepdim=True)


def _with_bounds(plan: Plan, features: list[Tensor], half_unit: float) -> dict[int, tuple[Tensor, Tensor]]:
    """Return each forecast in float64 without any rounding of the history, and how far off a row of it may be."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    values: dict[int, Tensor] = {}
    errors: dict[int, Tensor] = {}
    for segment in plan.segments:
        full = segment.full_step
        values[full] = features[full].double()
        errors[full] = half_unit * _largest(values[full])
        for launch in segment.launches:
            for step, row, offset in zip(launch.steps, launch.coefficients, launch.offsets, strict=True):
                terms = list(zip(row, launch.inputs, strict=True))
                values[step] = offset + sum(c * values[k] for c, k in terms)
                error = sum((abs(c) * errors[k] for c, k in terms), torch.zeros(()))
                found[step] = values[step], error
                errors[step] = error + half_unit * (_largest(values[step]) + error)
    return found


@DTYPES
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("forecaster", [TaylorSeer(2), LesaPredictor(num_steps=STEPS, hidden_dim=8)], ids=["T", "L"])
def test_forecasts_are_off_by_no_more_than_the_rounding(
    dtype: torch.dtype, chunk: int | None, forecaster: Forecaster
) -> None:
    session = Session(forecaster.plan(SIGMAS, INTERVAL, chunk=chunk), history_dtype=dtype)
    features = [torch.randn(2, 5, 24) * 10 ** torch.randn(2, 5, 1) for _ in range(STEPS)]
    bounds = _with_bounds(session.plan, features, HALF_UNIT[dtype])
    for step, got in _run(session, features):
        value, error = bounds.pop(step)
        assert got.dtype == torch.float32
        assert ((got - value).abs() <= 1.001 * error).all()
        assert ((got - value).abs() > 0.01 * error).any()
    assert not bounds


@DTYPES
@pytest.mark.parametrize("feature_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_reuse_hands_out_the_rounded_feature(dtype: torch.dtype, feature_dtype: torch.dtype) -> None:
    session = Session(Reuse().plan(SIGMAS, Schedule.explicit(STEPS, [0])), history_dtype=dtype)
    feature = torch.randn(6, 8, 3).to(feature_dtype).transpose(0, 1)  # not contiguous
    session.push(0, feature)
    want = unscaled(*scale_rows(feature.float(), dtype))
    assert session.ring is not None and session.ring.dtype == dtype and torch.equal(session.ring[0], want)
    for step in range(1, STEPS):
        assert torch.equal(session.forecast(step), want.to(feature_dtype))


@DTYPES
def test_forecasts_of_a_segment_stay_valid_until_the_next_push(dtype: torch.dtype) -> None:
    session = Session(TaylorSeer(2).plan(SIGMAS, INTERVAL), history_dtype=dtype)
    views: list[tuple[Tensor, Tensor]] = []
    for step in range(STEPS):
        if session.plan.is_full(step):
            assert all(torch.equal(view, copy) for view, copy in views)
            session.push(step, torch.randn(4))
            views = []
        else:
            view = session.forecast(step)
            views.append((view, view.clone()))


@pytest.mark.parametrize("chunk", [None, 1])
@DTYPES
def test_the_ring_takes_what_the_plan_says(dtype: torch.dtype, chunk: int | None) -> None:
    session = Session(TaylorSeer(2).plan(SIGMAS, INTERVAL, chunk=chunk), history_dtype=dtype)
    session.push(0, torch.randn(2, 8, 16, dtype=torch.bfloat16))
    assert session.ring is not None
    assert session.ring.nbytes == session.plan.ring_bytes((2, 8, 16), 2)
    assert session.ring.nbytes == 3 * (256 + 4 * 16) + (1 if chunk else 4) * 512


class Calls(TorchDispatchMode):
    """Notes the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "op"),
    [
        (None, "forecast_into"),
        (torch.bfloat16, "forecast_into"),
        *((dtype, "forecast_scaled_into") for dtype in HALF_UNIT),
    ],
    ids=str,
)
def test_a_cached_step_calls_one_op_and_takes_views(dtype: torch.dtype | None, op: str) -> None:
    session = Session(TaylorSeer(2).plan(SIGMAS, INTERVAL), history_dtype=dtype)
    features = [torch.randn(3, 8, dtype=torch.bfloat16) for _ in range(STEPS)]
    memory = set()
    for _ in range(2):
        for step, feature in enumerate(features):
            if session.plan.is_full(step):
                session.push(step, feature)
                continue
            with Calls() as calls:
                forecast = session.forecast(step)
            assert calls.ops <= {f"lesa::{op}", "aten::select.int", "aten::slice.Tensor"}
            memory.add(forecast.untyped_storage().data_ptr())
    assert len(memory) == 1


@DTYPES
def test_another_run_may_bring_features_of_another_dtype(dtype: torch.dtype) -> None:
    session = Session(Reuse().plan(SIGMAS, Schedule.explicit(STEPS, [0])), history_dtype=dtype)
    feature = torch.randn(3, 8)
    for kind in (torch.bfloat16, torch.float32):
        session.push(0, feature.to(kind))
        assert torch.equal(session.forecast(1), unscaled(*scale_rows(feature.to(kind).float(), dtype)).to(kind))


@DTYPES
def test_what_cannot_be_scaled_is_refused(dtype: torch.dtype) -> None:
    plan = TaylorSeer(1).plan(SIGMAS, Schedule.explicit(STEPS, [0, 3]))
    with pytest.raises(ValueError, match=f"history_device must be None for a history of {dtype}, got cpu"):
        Session(plan, history_dtype=dtype, history_device="cpu")
    session = Session(plan, history_dtype=dtype)
    with pytest.raises(TypeError, match=f"feature must be of .* for a history of {dtype}, got torch.float64"):
        session.push(0, torch.randn(4, dtype=torch.float64))
    with pytest.raises(ValueError, match=f"feature must have at least one dimension for a history of {dtype}"):
        session.push(0, torch.randn(()))
    session.push(0, torch.randn(4))
    session.forecast(1)
    session.forecast(2)
    with pytest.raises(
        (TypeError, RuntimeError), match="feature must have a dtype of float32, float16, bfloat16, got float64"
    ):
        session.push(3, torch.randn(4, dtype=torch.float64))
    assert session.forecast(2).dtype == session.feature_dtype == torch.float32


def test_other_dtypes_are_no_history() -> None:
    plan = Reuse().plan(SIGMAS, Schedule.explicit(STEPS, [0]))
    for dtype in (torch.int16, torch.uint8, torch.float8_e5m2):
        with pytest.raises(TypeError, match=r"history_dtype must be one of .*torch\.int8, torch\.float8_e4m3fn"):
            Session(plan, history_dtype=dtype)

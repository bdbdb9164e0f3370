"""Plans and sessions: composition, liveness, order, and that a session computes what the formula says."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lesa_kernels import LesaPredictor, Plan, Predictor, Reuse, Schedule, Session, TaylorSeer
from lesa_kernels.plan import Row, RowRule, compile_plan

SIGMAS = [1 - step / 20 for step in range(21)]


class RandomRows(Predictor):
    """Reads a random set of earlier steps: the hardest plan there is."""

    def __init__(self, rows: dict[int, Row]) -> None:
        self._rows = rows

    def rows(self, sigmas: Sequence[float]) -> RowRule:
        return lambda step, full_steps: self._rows[step]


def _stepwise(plan_rows: RowRule, plan: Plan, features: Sequence[Tensor]) -> list[Tensor]:
    """Run the uncomposed rows in float64."""
    history: list[Tensor] = []
    for step in range(plan.num_steps):
        if plan.is_full(step):
            history.append(features[step])
            continue
        row = plan_rows(step, [full for full in plan.full_steps if full < step])
        assert row is not None
        history.append(sum((c * history[k] for k, c in row.terms.items()), torch.zeros_like(features[0])) + row.offset)
    return history


def _run(plan: Plan, features: Sequence[Tensor]) -> list[Tensor]:
    session, results = Session(plan), []
    for step in range(plan.first_step, plan.num_steps):
        if plan.is_full(step):
            session.push(step, features[step])
            results.append(features[step])
        else:
            results.append(session.forecast(step).clone())
    return results


@st.composite
def _compiled(draw: st.DrawFn) -> tuple[Plan, RowRule]:
    """Compile random rows into a plan."""
    steps = draw(st.integers(2, 20))
    full = {0} | draw(st.sets(st.integers(0, steps - 1)))
    coefficient = st.floats(-1, 1)
    rows = {
        step: Row(
            draw(st.dictionaries(st.integers(0, step - 1), coefficient, min_size=1, max_size=5)), draw(coefficient)
        )
        for step in range(1, steps)
    }
    predictor = RandomRows(rows)
    sigmas = SIGMAS[: steps + 1]
    chunk = draw(st.sampled_from([None, 1, 2, 3]))
    return predictor.plan(sigmas, Schedule.explicit(steps, full), chunk=chunk), predictor.rows(sigmas)


@settings(max_examples=60, deadline=None)
@given(_compiled())
def test_any_rows_in_any_chunks_give_the_stepwise_result(compiled: tuple[Plan, RowRule]) -> None:
    plan, rows = compiled
    features = [torch.randn(3, dtype=torch.float64) for _ in range(plan.num_steps)]
    want = _stepwise(rows, plan, features)
    for got, wanted in zip(_run(plan, features), want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_forecasts_of_a_segment_stay_valid_until_the_next_push() -> None:
    plan = TaylorSeer(2).plan(SIGMAS, Schedule.interval(20, 5))
    session = Session(plan)
    views: list[tuple[Tensor, Tensor]] = []
    for step in range(20):
        if plan.is_full(step):
            assert all(torch.equal(view, copy) for view, copy in views)
            session.push(step, torch.randn(4))
            views = []
        else:
            view = session.forecast(step)
            views.append((view, view.clone()))


def test_lesa_plan_agrees_with_the_module(flux_sigmas: list[float]) -> None:
    predictor = LesaPredictor(num_steps=50, hidden_dim=16)
    schedule = Schedule.interval(50, 7)
    for chunk in (None, 1, 2):
        plan = predictor.plan(flux_sigmas, schedule, chunk=chunk)
        features = [torch.randn(6, 5) for _ in range(50)]
        history: list[Tensor] = []
        for step, got in enumerate(_run(plan, features)):
            if plan.is_full(step):
                history.append(features[step])
            else:
                history.append(predictor(history, flux_sigmas, flux_sigmas[step]).detach())
            torch.testing.assert_close(got, history[-1], rtol=1e-4, atol=1e-4 * history[-1].abs().max().item())


def test_published_plan_in_numbers(flux_sigmas: list[float]) -> None:
    plan = LesaPredictor(num_steps=50, hidden_dim=8).plan(flux_sigmas, Schedule.interval(50, 7))
    assert plan.full_steps == (0, 1, 2, 3, 9, 16, 23, 30, 37, 44) and plan.speedup == 5.0
    assert plan.segments[4].launches[0].inputs == (5, 6, 7, 8, 9)
    middle = plan.segments[6].launches[0]
    assert len(middle.inputs) == 8 and len(middle.steps) == 6, "K reads and M writes: 14 passes instead of 54"
    # 8 live features; the outputs of a segment take the slots of inputs that nothing needs later.
    assert plan.num_slots == 8 and plan.ring_bytes((1, 4096, 3072), 2) == 8 * 4096 * 3072 * 2


def test_a_plan_makes_full_what_has_too_short_a_history(flux_sigmas: list[float]) -> None:
    predictor = LesaPredictor(num_steps=8, hidden_dim=8)
    few = [1.0, 0.95, 0.92, 0.85, 0.7, 0.5, 0.3, 0.1, 0.0]
    assert predictor.plan(few, Schedule.explicit(8, [0])).full_steps == tuple(range(8))
    shifted = LesaPredictor(num_steps=50, hidden_dim=8).plan(flux_sigmas, Schedule.explicit(50, [0, 30]), first_step=20)
    assert shifted.full_steps == (*range(20, 28), 30)


def test_reuse_and_schedule_rules() -> None:
    rule = functools.partial(Schedule.uniform_in_sigma, num_full=4)
    plan = Reuse().plan(SIGMAS, rule)
    features = [torch.randn(3) for _ in range(20)]
    last = features[0]
    for step, got in enumerate(_run(plan, features)):
        last = features[step] if plan.is_full(step) else last
        assert torch.equal(got, last)
    assert len(plan.full_steps) == 4
    assert Reuse().plan(torch.tensor(SIGMAS), rule).full_steps == plan.full_steps


def test_full_features_that_nothing_reads_are_not_stored() -> None:
    plan = Reuse().plan(SIGMAS, Schedule.explicit(20, range(20)))
    assert plan.num_slots == 0 and not any(segment.slots for segment in plan.segments)
    session = Session(plan)
    for step in range(20):
        session.push(step, torch.randn(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_history_dtype(dtype: torch.dtype) -> None:
    session = Session(Reuse().plan(SIGMAS, Schedule.explicit(20, [0])), history_dtype=dtype)
    feature = torch.randn(5)
    session.push(0, feature)
    assert session.ring is not None and session.ring.dtype == dtype
    # Rounded to the dtype of the ring, handed out in that of the feature.
    assert torch.equal(session.forecast(1), feature.to(dtype).to(feature.dtype))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int16], ids=str
)
def test_other_dtypes_are_no_history(dtype: torch.dtype) -> None:
    plan = Reuse().plan(SIGMAS, Schedule.explicit(20, [0]))
    with pytest.raises(TypeError, match=rf"history_dtype must be None or one of .*torch\.bfloat16.*, got {dtype}"):
        Session(plan, history_dtype=dtype)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_ring_takes_what_the_plan_says(dtype: torch.dtype, chunk: int | None) -> None:
    session = Session(TaylorSeer(2).plan(SIGMAS, Schedule.interval(20, 5), chunk=chunk), history_dtype=dtype)
    session.push(0, torch.randn(2, 8, 16))
    assert session.ring is not None
    assert session.ring.nbytes == session.plan.ring_bytes((2, 8, 16), dtype.itemsize)
    assert session.ring.nbytes == (4 if chunk else 6) * 256 * dtype.itemsize


class Calls(TorchDispatchMode):
    """Notes the ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_a_cached_step_calls_one_op_and_takes_views(dtype: torch.dtype | None) -> None:
    session = Session(TaylorSeer(2).plan(SIGMAS, Schedule.interval(20, 5)), history_dtype=dtype)
    features = [torch.randn(3, 8, dtype=torch.bfloat16) for _ in range(20)]
    memory, ops = set(), set()
    for _ in range(2):
        for step, feature in enumerate(features):
            if session.plan.is_full(step):
                session.push(step, feature)
                continue
            with Calls() as calls:
                forecast = session.forecast(step)
            ops |= calls.ops
            memory.add(forecast.untyped_storage().data_ptr())
    assert ops == {"lesa::forecast_into", "aten::select.int"} and len(memory) == 1


def test_another_run_may_bring_features_of_another_dtype() -> None:
    session = Session(Reuse().plan(SIGMAS, Schedule.explicit(20, [0])), history_dtype=torch.bfloat16)
    feature = torch.randn(3, 8)
    for dtype in (torch.bfloat16, torch.float32):
        session.push(0, feature.to(dtype))
        forecast = session.forecast(1)
        assert forecast.dtype == dtype and torch.equal(forecast, feature.bfloat16().to(dtype))


def test_a_run_inside_inference_mode_and_one_outside() -> None:
    session = Session(TaylorSeer(1).plan(SIGMAS, Schedule.explicit(20, [0, 3])))
    feature = torch.randn(5, requires_grad=True)
    with torch.inference_mode():
        session.push(0, feature)
        session.forecast(1)
    session.push(0, feature)
    assert torch.equal(session.forecast(1), feature) and not session.forecast(1).requires_grad


def test_order_and_shape_are_watched() -> None:
    session = Session(TaylorSeer(1).plan(SIGMAS, Schedule.explicit(20, [0, 3, 6])))
    with pytest.raises(RuntimeError, match="step 1 must follow a push of step 0, the last was None"):
        session.forecast(1)
    with pytest.raises(RuntimeError, match="step 3 must follow a push of step 0"):
        session.push(3, torch.randn(3))
    session.push(0, torch.randn(3))
    with pytest.raises(ValueError, match=r"step must be a full step of the plan \(0, 3, 6\), got 1"):
        session.push(1, torch.randn(3))
    with pytest.raises(ValueError, match="step must be a forecast step"):
        session.forecast(3)
    with pytest.raises(RuntimeError, match="step 3 must follow the forecast of step 1"):
        session.push(3, torch.randn(3))
    session.forecast(1)
    with pytest.raises(ValueError, match=r"feature must stay of shape \(3,\)"):
        session.push(3, torch.randn(4))
    session.push(3, torch.randn(3))
    with pytest.raises(RuntimeError, match="step 7 must follow a push of step 6"):
        session.forecast(7)
    session.push(0, torch.randn(2, 2))
    assert session.forecast(2).shape == (2, 2)
    session.reset()
    with pytest.raises(RuntimeError):
        session.forecast(2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
def test_what_is_no_feature_is_a_type_error(dtype: torch.dtype) -> None:
    session = Session(Reuse().plan(SIGMAS, Schedule.explicit(20, [0])))
    with pytest.raises(TypeError, match="feature must have a dtype of float32, float16, bfloat16, float64, got"):
        session.push(0, torch.ones(3).to(dtype))
    with pytest.raises(TypeError, match=r"feature must be a dense \(strided\) tensor, got a torch.sparse_coo one"):
        session.push(0, torch.ones(3).to_sparse())


def test_chunks_run_in_order() -> None:
    session = Session(Reuse().plan(SIGMAS, Schedule.explicit(20, [0]), chunk=2))
    session.push(0, torch.randn(3))
    with pytest.raises(RuntimeError, match="chunks run once, in order"):
        session.forecast(5)


def test_compile_plan_errors() -> None:
    def rule(step: int, full_steps: Sequence[int]) -> Row:
        return Row({full_steps[-1]: 1.0})

    with pytest.raises(ValueError, match=r"schedule must have 20 steps.*got 10"):
        compile_plan(SIGMAS, Schedule.explicit(10, [0]), rule)
    with pytest.raises(ValueError, match=r"first_step must be in \[0, 20\), got 20"):
        compile_plan(SIGMAS, Schedule.explicit(20, [0]), rule, first_step=20)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        compile_plan(SIGMAS, Schedule.explicit(20, [0]), rule, chunk=0)
    with pytest.raises(ValueError, match="the row of step 1 must read steps 0 to 0, got step 1"):
        compile_plan(SIGMAS, Schedule.explicit(20, [0]), lambda step, full: Row({step: 1.0}))
    with pytest.raises(ValueError, match="the row of step 1 must read at least one feature"):
        compile_plan(SIGMAS, Schedule.explicit(20, [0]), lambda step, full: Row({}))


def test_a_segment_longer_than_a_launch_is_split() -> None:
    sigmas = [1 - step / 100 for step in range(101)]
    plan = TaylorSeer(1).plan(sigmas, Schedule.explicit(100, [0]))
    assert [len(launch.steps) for launch in plan.segments[0].launches] == [64, 35]
    assert len(_run(plan, [torch.randn(2)] * 100)) == 100


def test_the_plan_prints_itself(flux_sigmas: list[float]) -> None:
    text = (
        LesaPredictor(num_steps=50, hidden_dim=8).plan(flux_sigmas, Schedule.interval(50, 7)).describe((1, 4096, 3072))
    )
    assert "full steps: 0 1 2 3 9 16 23 30 37 44" in text
    assert "ring: 8 slots, 192.0 MiB" in text
    assert "after 16: steps 17-22 from 8 features, of steps 9 10 11 12 13 14 15 16" in text
    assert "passes over memory: 89 instead of 328" in text


def _quantities(step: int, full: Sequence[int]) -> Row:
    """A row over two quantities of the last two full steps and one of the first."""
    recent = full[-2:]
    terms = {(each, name): 0.1 * each + len(name) for each in recent for name in ("u", "cc")}
    return Row({**terms, (full[0], "noise"): 0.5})


def test_quantities_of_full_steps_are_read_as_features_are() -> None:
    plan = compile_plan(SIGMAS, Schedule.explicit(20, [0, 3, 7]), _quantities)
    assert plan.quantities == {"u", "cc", "noise"}
    assert "tensors" in str(plan)
    assert all(len(launch.write) == 1 for segment in plan.segments for launch in segment.launches), "equal rows: one"
    tensors = {(step, name): torch.randn(5) for step in plan.full_steps for name in ("u", "cc", "noise")}
    session = Session(plan)
    for _ in range(2):  # a second run finds the memory of the first
        for step in range(20):
            if plan.is_full(step):
                for name in ("noise", "cc", "u"):
                    session.push(step, tensors[step, name], name)
                continue
            row = _quantities(step, [full for full in plan.full_steps if full < step])
            expected = sum(value * tensors[term] for term, value in row.terms.items())
            torch.testing.assert_close(session.forecast(step), expected)


def test_quantities_that_are_left_out_are_missed() -> None:
    session = Session(compile_plan(SIGMAS, Schedule.explicit(20, [0, 3, 7]), _quantities))
    with pytest.raises(ValueError, match="quantity must be one of"):
        session.push(0, torch.ones(3))
    session.push(0, torch.ones(3), "u")
    session.push(0, torch.ones(3), "noise")
    with pytest.raises(RuntimeError, match=r"must follow a push of .*cc"):
        session.forecast(1)
    with pytest.raises(RuntimeError, match="must follow the forecast of step 1"):
        session.push(3, torch.ones(3), "u")
    plain = Session(TaylorSeer().plan(SIGMAS, Schedule.explicit(20, [0, 3, 7])))
    with pytest.raises(ValueError, match="quantity must be None"):
        plain.push(0, torch.ones(3), "u")


def test_reuse_computes_a_segment_once() -> None:
    plan = Reuse().plan(SIGMAS, Schedule.explicit(20, [0, 3, 7]))
    assert [len(launch.write) for segment in plan.segments for launch in segment.launches] == [1, 1, 1]
    session = Session(plan)
    session.push(0, torch.arange(3.0))
    assert session.forecast(1).tolist() == session.forecast(2).tolist() == [0, 1, 2]

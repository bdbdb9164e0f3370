"""The norm of a forecast from a session: what it is, in how many passes, and what is left in the ring."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lesa_kernels import Plan, Reuse, Schedule, Session, TaylorSeer, session
from lesa_kernels.history import HostRing
from lesa_kernels.plan import Row, compile_plan

SIGMAS = [1 - step / 8 for step in range(9)]
FULL = Schedule.explicit(8, [0, 1, 5])
SHAPE = (2, 3, 16)
EPS = 1e-6
# What the ops raise; compiled kernels know RuntimeError alone.
REFUSED = (ValueError, TypeError, RuntimeError)

# What is asked for on a forecast step, in this order.
ASKED = ["n", "f", "nf", "fn", "nn", "pn", "ppf"]


class Passes(TorchDispatchMode):
    """Notes the passes over the ring: (op, slots read, slots written)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[int], list[int]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() in ("lesa::forecast_into", "lesa::forecast_norm"):
            self.seen.append((func.name()[6:], list(args[3]), list(args[4])))
        return func(*args, **(kwargs or {}))


def modulation(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    scale, shift = torch.randn(2, SHAPE[0], SHAPE[-1], generator=generator).to(dtype)
    return scale, shift


def norm_of(feature: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """FLUX's final norm in float64."""
    plain = torch.nn.functional.layer_norm(feature.double(), feature.shape[-1:], eps=EPS)
    return plain * (1 + scale.double()[:, None]) + shift.double()[:, None]


def plain_run(plan: Plan, features: list[Tensor]) -> list[Tensor]:
    """The features of all steps, forecast without norms."""
    plain, results = Session(plan), []
    for step in range(plan.num_steps):
        if plan.is_full(step):
            plain.push(step, features[step])
        results.append(features[step] if plan.is_full(step) else plain.forecast(step).clone())
    return results


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_norms_and_features_mix_in_any_order(data: st.DataObject) -> None:
    full = {0} | data.draw(st.sets(st.integers(0, 7)))
    rows = {
        step: Row(data.draw(st.dictionaries(st.integers(0, step - 1), st.floats(-1, 1), min_size=1, max_size=4)), 0.1)
        for step in range(1, 8)
    }
    chunk = data.draw(st.sampled_from([None, 1, 2]))
    plan = compile_plan(SIGMAS, Schedule.explicit(8, full), lambda step, _: rows[step], chunk=chunk)
    features = [torch.randn(SHAPE, dtype=torch.float64) for _ in range(8)]
    wanted, run = plain_run(plan, features), Session(plan)
    for step in range(8):
        if plan.is_full(step):
            run.push(step, features[step])
            continue
        scale, shift = modulation(step)
        for kind in data.draw(st.sampled_from(ASKED)):
            if kind == "p":
                run.prepare(step)
            elif kind == "f":
                torch.testing.assert_close(run.forecast(step), wanted[step])
            else:
                got = run.forecast_norm(step, scale, shift, EPS)
                # Random rows may cancel to noise, which the norm then blows up.
                if float(wanted[step].std()) > 1e-6:
                    torch.testing.assert_close(got, norm_of(wanted[step], scale, shift), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_norm_is_rounded_once(dtype: torch.dtype, chunk: int | None) -> None:
    """Half a unit in the last place: of the exact forecast in one pass, of the feature that lies in the ring in two."""
    plan = TaylorSeer(1).plan(SIGMAS, FULL, chunk=chunk)
    features = [torch.randn(SHAPE).to(dtype) for _ in range(8)]
    exact = plain_run(plan, [feature.double() for feature in features])
    run = Session(plan)
    for step in range(8):
        if plan.is_full(step):
            run.push(step, features[step])
            continue
        scale, shift = modulation(step, dtype)
        got = run.forecast_norm(step, scale, shift, EPS)
        assert got.dtype == dtype and got.is_contiguous()
        want = norm_of(exact[step] if chunk else run.forecast(step), scale, shift)
        assert bool(((got.double() - want).abs() <= want.abs() * torch.finfo(dtype).eps / 2 + 1e-5).all())


def test_a_step_of_its_own_takes_one_pass_and_keeps_only_what_is_read_later() -> None:
    # Step 3 reads the forecasts of steps 1 and 2; nothing reads those of 3 and 5.
    rows = {1: Row({0: 1.0}), 2: Row({0: 0.5, 1: 0.5}), 3: Row({1: 0.5, 2: 0.5}), 5: Row({0: 0.3, 4: 0.7})}
    plan = compile_plan(
        [1 - step / 6 for step in range(7)], Schedule.explicit(6, [0, 4]), lambda step, _: rows[step], chunk=1
    )
    launches = [launch for segment in plan.segments for launch in segment.launches]
    run = Session(plan)
    with Passes() as passes:
        for step in range(6):
            if plan.is_full(step):
                run.push(step, torch.randn(SHAPE))
            else:
                run.forecast_norm(step, *modulation(step), EPS)
    kept = [True, True, False, False]
    assert passes.seen == [
        ("forecast_norm", list(launch.read), list(launch.write) if keep else [])
        for launch, keep in zip(launches, kept, strict=True)
    ]


def test_a_segment_is_computed_once_and_its_features_are_normed_where_they_lie() -> None:
    plan = TaylorSeer(1).plan(SIGMAS, FULL)
    run = Session(plan)
    for step in (0, 1):
        run.push(step, torch.randn(SHAPE))
    with Passes() as passes:
        run.prepare(2)
        assert [op for op, _, _ in passes.seen] == ["forecast_into"]
        for step in (2, 3, 4):
            run.forecast_norm(step, *modulation(step), EPS)
    assert passes.seen[1:] == [("forecast_norm", [0], [])] * 3


@pytest.mark.parametrize("place", ["other dtype", "host"])
def test_a_history_of_another_kind_hands_its_features_out_first(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Reuse().plan(SIGMAS, FULL, chunk=1)
    feature = torch.randn(SHAPE)
    if place == "host":
        monkeypatch.setattr(session, "lies_elsewhere", lambda device: True)
        run = Session(plan, history_device="cpu")
    else:
        run = Session(plan, history_dtype=torch.bfloat16)
        feature = feature.bfloat16().float()
    run.push(0, feature)
    run.push(1, feature)
    with Passes() as passes:
        got = run.forecast_norm(2, *modulation(2), EPS)
    assert [op for op, _, _ in passes.seen] == ["forecast_into", "forecast_norm"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), norm_of(feature, *modulation(2)), rtol=1e-5, atol=1e-5)


def test_preparing_carries_no_feature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "lies_elsewhere", lambda device: True)
    run = Session(Reuse().plan(SIGMAS, FULL, chunk=1), history_device="cpu")
    for step in (0, 1):
        run.push(step, torch.randn(SHAPE))
    assert isinstance(run.ring, HostRing)
    before = run.ring.copied_bytes
    run.prepare(2)
    assert run.ring.copied_bytes == before
    run.forecast_norm(2, *modulation(2), EPS)
    assert run.ring.copied_bytes == before + run.ring.nbytes // run.ring.num_slots


@pytest.mark.parametrize("chunk", [None, 1])
def test_one_scale_and_shift_serve_a_whole_batch(chunk: int | None) -> None:
    run = Session(Reuse().plan(SIGMAS, FULL, chunk=chunk))
    feature = torch.randn(SHAPE)
    run.push(0, feature)
    run.push(1, feature)
    scale, shift = (each[:1] for each in modulation(2))
    torch.testing.assert_close(
        run.forecast_norm(2, scale, shift, EPS).double(), norm_of(feature, scale, shift), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("chunk", [None, 1])
def test_order_and_arguments_are_watched(chunk: int | None) -> None:
    run = Session(TaylorSeer(1).plan(SIGMAS, FULL, chunk=chunk))
    scale, shift = modulation(0)
    for call in (run.prepare, lambda step: run.forecast_norm(step, scale, shift, EPS)):
        with pytest.raises(RuntimeError, match="step 2 must follow a push of step 1, the last was None"):
            call(2)
        with pytest.raises(ValueError, match="step must be a forecast step of the plan"):
            call(5)
    run.push(0, torch.randn(SHAPE))
    run.push(1, torch.randn(SHAPE))
    if chunk:
        with pytest.raises(RuntimeError, match="chunks run once, in order"):
            run.prepare(3)
    for wrong in (scale[:, :4], scale.expand(3, 2, 16), scale[0], scale[0, 0]):
        with pytest.raises(REFUSED, match="lesa::forecast_norm: scale must have shape"):
            run.forecast_norm(2, wrong, shift, EPS)
    with pytest.raises(REFUSED, match="lesa::forecast_norm: shift must have dtype float32"):
        run.forecast_norm(2, scale, shift.half(), EPS)
    run.forecast_norm(2, scale, shift, EPS)
    if chunk:
        with pytest.raises(RuntimeError, match="step 5 must follow the forecast of step 3"):
            run.push(5, torch.randn(SHAPE))
    run.push(0, torch.randn(SHAPE))
    with pytest.raises(RuntimeError, match="step 2 must follow a push of step 1, the last was 0"):
        run.forecast_norm(2, scale, shift, EPS)


def test_a_feature_without_tokens_has_no_norm() -> None:
    run = Session(Reuse().plan(SIGMAS, FULL, chunk=1))
    for step in (0, 1):
        run.push(step, torch.randn(16))
    with pytest.raises(REFUSED, match="ring must have shape"):
        run.forecast_norm(2, *modulation(2), EPS)

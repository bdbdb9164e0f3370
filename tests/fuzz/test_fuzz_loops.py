"""Sampling loops of any kind: full calls are the plain model's, forecasts the formula's, and what ran full says why.

`make fuzz` draws 1,000 loops with a fixed seed, `make test` a few dozen and one of each kind.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import diffusers
import pytest
import sampling_loops
import torch
from drawn_loops import PLACES, Loop, Other, loops
from hypothesis import HealthCheck, given, seed, settings
from sampling_loops import COUNTS, Played, problems_of

from lesa_kernels import Session
from lesa_kernels.integrations.stats import Summary

# Of one pipeline half of them, of each place of another run a tenth: `make fuzz` has 10,000 in its profile.
EXAMPLES = max(60, settings().max_examples // 10)
drawn = settings(max_examples=EXAMPLES // 10, database=None, suppress_health_check=list(HealthCheck))

# How diffusers hands torch's tensors to NumPy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.usefixtures("one_thread", "_quiet"),
]

GUIDED_ONCE = Loop(branches="unnamed", uncond_first=True, guided=(0, 4))
KINDS = {
    "one call a step": Loop(),
    "contexts": Loop(branches="named"),
    "two calls without contexts": Loop(branches="unnamed"),
    "two halves of one call": Loop(branches="batched"),
    "prompts made anew in each step": Loop(branches="named", held=False),
    "guidance that ends": Loop(branches="named", guided=(0, 4)),
    "guidance that begins": Loop(branches="named", guided=(3, 8)),
    "guidance that ends, unconditional call first, without contexts": GUIDED_ONCE,
    "the same, prompts made anew": replace(GUIDED_ONCE, held=False),
    "guidance that ends in one call": Loop(branches="batched", guided=(0, 4)),
    "calls in another order": Loop(branches="named", swapped=3),
    "calls in another order without contexts": Loop(branches="unnamed", swapped=3),
    "sigmas and two calls a step": Loop(branches="unnamed", enabled_by="sigmas"),
    "sigmas and contexts": Loop(branches="named", enabled_by="sigmas"),
    "a late start that is told": Loop(start=3),
    "a late start that is not told": Loop(start=3, is_told=False),
    "a late start of a scheduler without index": Loop(start=3, is_told=False, scheduler="ddim"),
    "a late start with sigmas": Loop(start=3, enabled_by="sigmas"),
    "an early end": Loop(stop=5),
    "a batch that grows": Loop(batch=(1, 2, 3)),
    "a batch that shrinks": Loop(batch=(2, 1, 3), branches="named"),
    "a prompt exchanged": Loop(event=("prompt", 3)),
    "a prompt written over": Loop(event=("prompt in place", 3)),
    "guidance exchanged": Loop(event=("guidance", 3)),
    "guidance written over": Loop(event=("guidance in place", 3)),
    "sigmas scaled in place": Loop(event=("sigmas in place", 3)),
    "sigmas exchanged": Loop(event=("sigmas replaced", 3)),
    "residuals of a ControlNet": Loop(residuals=True),
    "a hook that writes": Loop(writes=True),
    "a run broken off, and again": Loop(full=(0, 1, 6), other=Other("broken off", 3, 8, "euler flow")),
    "a run of given sigmas broken off, and again": Loop(
        full=(0, 1, 6), enabled_by="sigmas", other=Other("broken off", 3, 8, "euler flow")
    ),
    "another pipeline in a callback": Loop(other=Other("callback", 2, 6, "euler flow")),
    "another pipeline after a broken-off run": Loop(full=(0, 1, 6), other=Other("after", 3, 6, "euler flow")),
    "another pipeline in a thread, in step": Loop(other=Other("threads", 0, 8, "euler flow")),
    "another pipeline in a thread": Loop(other=Other("uneven threads", 0, 8, "euler flow")),
    "two enabled pipelines": Loop(other=Other("after", 3, 6, "euler flow", enabled=True)),
}


@pytest.fixture(scope="module", autouse=True)
def _told(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        reporter.write_line("\n" + ", ".join(f"{count} {what}" for what, count in COUNTS.items()), flush=True)


@pytest.fixture
def _quiet() -> Iterator[None]:
    """Keep diffusers' log silent."""
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_each_kind(kind: str) -> None:
    assert problems_of(KINDS[kind]) == []


@seed(18)
@settings(drawn, max_examples=EXAMPLES // 2)
@given(loops())
def test_loops_of_one_pipeline(loop: Loop) -> None:
    assert problems_of(loop) == []


@pytest.mark.parametrize("place", PLACES)
def test_loops_of_several_runs_on_one_transformer(place: str) -> None:
    @seed(18)
    @drawn
    @given(loops(place))
    def check(loop: Loop) -> None:
        assert problems_of(loop) == []

    check()


def test_a_wrong_forecast_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forecast = Session.forecast
    monkeypatch.setattr(Session, "forecast", lambda session, step: forecast(session, step) * 1.05)
    assert "a forecast that is not the formula's" in problems_of(Loop())[0]


def test_a_lost_forecast_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step ran full that is not the schedule's, and the summary tells nothing of it."""
    played = Played(Loop())
    assert played.play().problems == []
    call = played.record.calls[3]
    assert not call.is_full
    call.is_full = True
    monkeypatch.setattr(sampling_loops, "summary", lambda target: Summary(8))
    played.explain(call.run)
    assert played.record.problems == ["first run, cond: full at [3] without a reason"]


def test_a_full_call_that_is_not_the_model_s_is_found() -> None:
    played = Played(Loop())
    with torch.no_grad():
        played.plain.proj_out.bias += 0.1
    try:
        assert "not the plain model's" in played.play().problems[0]
    finally:
        with torch.no_grad():
            played.plain.proj_out.bias -= 0.1

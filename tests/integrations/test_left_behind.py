"""What runs leave behind: histories of broken-off runs, and compiled models that are recorded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: diffusers)")

from tiny_flux import call_arguments, tiny_transformer

import lesa_kernels as lesa
from lesa_kernels.integrations import state
from lesa_kernels.session import Session

STEPS = 10
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
SCHEDULE = lesa.Schedule.explicit(STEPS, (0, 1, 5))


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> Iterator[weakref.WeakSet[Session]]:
    """The sessions that exist, without help of the cyclic garbage collection."""
    sessions: weakref.WeakSet[Session] = weakref.WeakSet()

    class Watched(Session):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            sessions.add(self)

    monkeypatch.setattr(state, "Session", Watched)
    gc.disable()
    yield sessions
    gc.enable()


@torch.no_grad()
def _sample(model: torch.nn.Module, steps: int = STEPS, guided_until: int = 0) -> None:
    latents = torch.randn(1, 6, 4)
    for step in range(steps):
        for name in ("cond", "uncond")[: 1 + (step < guided_until)]:
            with model.cache_context(name, step_index=step):
                model(**call_arguments(latents, SIGMAS[step]))


def test_a_run_that_was_broken_off_frees_its_history_when_the_next_one_starts(alive: weakref.WeakSet[Session]) -> None:
    model = tiny_transformer()
    lesa.enable(model, lesa.TaylorSeer(), SCHEDULE, sigmas=SIGMAS)
    for _ in range(4):
        _sample(model, steps=4)
    assert len(alive) == 1


def test_guidance_that_ends_early_frees_its_history_at_the_end_of_the_run(alive: weakref.WeakSet[Session]) -> None:
    model = tiny_transformer()
    lesa.enable(model, lesa.TaylorSeer(), SCHEDULE, sigmas=SIGMAS)
    _sample(model, guided_until=6)
    assert len(alive) == 0


@pytest.mark.parametrize("in_place", [False, True])
def test_features_of_a_model_that_ran_compiled_before_are_recorded(in_place: bool) -> None:
    torch.compiler.reset()
    model = tiny_transformer()
    if in_place:
        model.compile(backend="eager")
    target = model if in_place else torch.compile(model, backend="eager")
    latents = torch.randn(1, 6, 4)
    with torch.no_grad():
        target(**call_arguments(latents, 0.5))
        for _ in range(2):
            with lesa.recorded(target) as features:
                target(**call_arguments(latents, 0.4))
            assert len(features) == 1

"""A cached step is short: few Python functions run around the model's tail."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import diffusers.hooks
import pytest
import torch
from tiny_flux import TinyPipeline, call_arguments, tiny_transformer

import lesa_kernels as lesa
from lesa_kernels.integrations.models import flux_tail
from lesa_kernels.ring import Ring

STEPS = 10
FULL = (0, 1, 5)
SPARSE = lesa.Schedule.explicit(STEPS, FULL)
MOST_FRAMES = 40
COUNTED = tuple(str(Path(module.__file__ or "").parent) for module in (lesa, diffusers.hooks))


class Frames:
    """Counts every entry into a Python function of this package or of diffusers' hooks around the step's own work.

    That work is left out: `flux_tail` with all that it calls, which the model computes on a cached step, and the op
    below `Ring.forecast`, which runs once a segment. A function that is entered twice counts twice. Functions of torch
    and of Python's own library are not counted.
    """

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.tails = 0
        self._within: CodeType | None = None

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "return" and code is self._within:
            self._within = None
        if event != "call" or self._within is not None:
            return
        if code in (flux_tail.__code__, Ring.forecast.__code__):
            self._within = code
        if code is flux_tail.__code__:
            self.tails += 1
        elif code.co_filename.startswith(COUNTED):
            self.entered.append(f"{Path(code.co_filename).name}: {code.co_name}")


@contextmanager
def counting_frames() -> Iterator[Frames]:
    frames, earlier = Frames(), sys.getprofile()
    sys.setprofile(frames)
    try:
        yield frames
    finally:
        sys.setprofile(earlier)


@torch.no_grad()
def test_a_cached_step_of_a_bare_transformer_enters_few_functions() -> None:
    model, sigmas = tiny_transformer(), [1 - step / STEPS for step in range(STEPS + 1)]
    lesa.enable(model, lesa.TaylorSeer(1), SPARSE, sigmas=sigmas)
    conditions = call_arguments(torch.randn(1, 6, 4), 1.0)
    for step in range(STEPS):
        arguments = conditions | {"hidden_states": torch.randn(1, 6, 4), "timestep": torch.tensor([sigmas[step]])}
        with counting_frames() as frames:
            model(**arguments)
        assert frames.tails == (step not in FULL)
        if step not in FULL:
            assert 10 < len(frames.entered) <= MOST_FRAMES, "\n".join(frames.entered)
    assert lesa.summary(model).forecast == STEPS - len(FULL)


def test_a_cached_step_of_a_pipeline_enters_few_functions(pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    lesa.enable(pipe, lesa.TaylorSeer(1), SPARSE)
    call, counts = pipe.transformer.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        with counting_frames() as frames:
            output = call(*args, **kwargs)
        counts.append((frames.tails, len(frames.entered)))
        return output

    monkeypatch.setattr(pipe.transformer, "forward", forward)
    pipe(STEPS)
    assert [tails for tails, _ in counts] == [step not in FULL for step in range(STEPS)]
    assert max(count for tails, count in counts if tails) <= MOST_FRAMES

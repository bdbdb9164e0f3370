"""Where the history lies, in which dtype, what it costs, and models whose own weights come and go."""

from __future__ import annotations

import itertools
import re
import weakref
from typing import Any

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from tiny_flux import CHANNELS, WIDTH, TinyPipeline, call_arguments, tiny_pipeline, tiny_transformer, watching
from torch import Tensor

from lesa_kernels import Reuse, Schedule, Session, TaylorSeer, session
from lesa_kernels.integrations import LesaWarning, disable, enable, summary
from lesa_kernels.ring import Ring

STEPS = 10
FULL = (0, 1, 5)
SPARSE = Schedule.explicit(STEPS, FULL)
TOKENS = 6
BYTES = TOKENS * WIDTH * 4


def test_a_small_dtype_takes_less_memory_and_rounds(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), SPARSE)
    pipe(STEPS)
    whole = summary(pipe).history_bytes
    enable(pipe, Reuse(), SPARSE, history_dtype=torch.bfloat16)
    with watching(pipe.transformer) as watch:
        pipe(STEPS)
    assert summary(pipe).history_bytes * 2 == whole > 0
    assert summary(pipe).history_memory == "cpu"
    assert {feature.dtype for feature in watch.features} == {torch.float32}
    for step, feature in enumerate(watch.features):
        expected = watch.features[max(full for full in FULL if full <= step)]
        assert torch.equal(feature, expected if step in FULL else expected.bfloat16().float())


def test_forecasts_step_by_step_take_less_memory_and_give_the_same(pipe: TinyPipeline) -> None:
    found = {}
    for chunk in (None, 1):
        enable(pipe, TaylorSeer(1), SPARSE, chunk=chunk)
        found[chunk] = pipe(STEPS), summary(pipe).history_bytes
    torch.testing.assert_close(found[1][0], found[None][0])
    assert (found[None][1], found[1][1]) == (4 * BYTES, 3 * BYTES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_history_lies_beside_a_model_on_a_gpu() -> None:
    model = tiny_transformer()
    sigmas = [1 - step / STEPS for step in range(STEPS + 1)]

    def run(device: str) -> list[Tensor]:
        generator, outputs = torch.Generator().manual_seed(0), []
        for sigma in sigmas[:-1]:
            arguments = call_arguments(torch.randn(1, TOKENS, CHANNELS, generator=generator), sigma)
            outputs.append(model(**{name: value.to(device) for name, value in arguments.items()}).sample.cpu())
        return outputs

    enable(model, TaylorSeer(1), SPARSE, sigmas=sigmas)
    with torch.no_grad():
        expected = run("cpu")
        assert summary(model).history_memory == "cpu"
        model.to("cuda")
        found = run("cuda")
    assert summary(model).history_memory.startswith("cuda") and summary(model).forecast_seconds > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"history_dtype": torch.int16}, TypeError, r"must be None or one of .*torch.bfloat16.*, got torch\.int16"),
        ({"history_dtype": torch.int8}, TypeError, r"must be None or one of .*torch.bfloat16.*, got torch\.int8"),
        ({"history_dtype": torch.float8_e4m3fn}, TypeError, r"must be None or one of .*, got torch\.float8_e4m3fn"),
        ({"history_device": "cpu"}, TypeError, "unexpected keyword argument 'history_device'"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
        ({"chunk": 1.5}, TypeError, r"chunk must be an int or None, got 1\.5"),
        ({"chunk": "1"}, TypeError, "chunk must be an int or None, got '1'"),
        ({"on_other_sigmas": "ignore"}, ValueError, 'on_other_sigmas must be "refuse" or "adapt", got \'ignore\''),
    ],
)
def test_options_are_checked(pipe: TinyPipeline, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        enable(pipe, **options)
    assert not hasattr(pipe.transformer, "_diffusers_hook")


def test_a_history_without_memory_costs_no_image(pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = pipe(STEPS)
    enable(pipe, Reuse(), SPARSE)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 50 GiB")

    monkeypatch.setattr(session, "Ring", full)
    with pytest.warns(LesaWarning, match="the feature of step 0 could not be kept: tried to allocate 50 GiB"):
        assert torch.equal(pipe(STEPS), plain)
    assert (summary(pipe).full, summary(pipe).forecast) == (STEPS, 0)


@pytest.mark.parametrize(("launch", "step"), [(1, 2), (2, 6)])
def test_a_forecast_that_fails_costs_no_image(
    pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch, launch: int, step: int
) -> None:
    """The memory may end in the middle of a run: the rest of it is full."""
    enable(pipe, Reuse(), Schedule.explicit(STEPS, sorted({*FULL, *range(step, STEPS)})))
    expected = pipe(STEPS)
    enable(pipe, Reuse(), SPARSE)
    forecast, launches = Ring.forecast, itertools.count(1)

    def fail(*arguments: Any) -> None:
        if next(launches) == launch:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        forecast(*arguments)

    monkeypatch.setattr(Ring, "forecast", fail)
    with pytest.warns(LesaWarning, match=f"the feature of step {step} could not be forecast: tried to allocate"):
        assert torch.equal(pipe(STEPS), expected)
    made = len(set(range(step)) - set(FULL))
    assert (summary(pipe).full, summary(pipe).forecast) == (STEPS - made, made)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("offload_first", [True, False])
def test_group_offload_changes_nothing(kind: str, offload_first: bool) -> None:
    pipe = tiny_pipeline()
    enable(pipe, TaylorSeer(1), SPARSE)
    expected = pipe(STEPS)
    if offload_first:
        disable(pipe)
    apply_group_offloading(
        pipe.transformer, onload_device=torch.device("cpu"), offload_type=kind, num_blocks_per_group=1
    )
    if offload_first:
        enable(pipe, TaylorSeer(1), SPARSE)
    for _ in range(2):
        with watching(pipe.transformer) as watch:
            assert torch.equal(pipe(STEPS), expected)
        assert watch.blocks == len(FULL) * 3
    disable(pipe)
    assert any(hasattr(module, "_diffusers_hook") for module in pipe.transformer.modules())


def test_the_summary_measures_both_kinds_of_call(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(1), SPARSE)
    with watching(pipe.transformer) as watch:
        pipe(STEPS)
    found = summary(pipe)
    assert found.full_seconds > 0 and found.forecast_seconds > 0
    assert found.skipped_blocks == STEPS * 3 - watch.blocks
    text = str(found)
    assert "10 steps: 3 calls full, 7 forecast; 21 calls of blocks skipped" in text
    assert re.search(r"time: \d+\.\d\d ms a full call, \d+\.\d\d ms a forecast call", text)
    assert re.search(r"history: \d+\.\d MiB on cpu", text)


def test_only_one_of_two_transformers_keeps_a_history(sessions: weakref.WeakSet[Session]) -> None:
    """As in Wan 2.2, where the second one takes over in the middle and neither comes back."""
    pipe = tiny_pipeline()
    pipe.transformer_2 = tiny_transformer()
    enable(pipe, TaylorSeer(1), SPARSE)
    sigmas = [1 - step / STEPS for step in range(1, STEPS)]
    pipe.scheduler.set_timesteps(sigmas=[1.0, *sigmas], mu=0.8)
    latents = torch.randn(1, TOKENS, CHANNELS)
    alive = []
    with torch.no_grad():
        for index, t in enumerate(pipe.scheduler.timesteps):
            model = pipe.transformer if index < 4 else pipe.transformer_2
            output = model(**call_arguments(latents, float(t) / 1000)).sample
            latents = pipe.scheduler.step(output, t, latents).prev_sample
            alive.append(len(sessions))
    assert alive == [1] * (STEPS - 1) + [0]
    assert (summary(pipe).full, summary(pipe).forecast) == (4, 6)

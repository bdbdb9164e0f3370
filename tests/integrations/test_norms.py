"""FLUX's final norm in one pass with the forecast: when, when not, and that it gives what the modules give."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous
from tiny_flux import WIDTH, TinyPipeline, add_lora, call_arguments, tiny_transformer
from torch import Tensor, nn

import lesa_kernels as lesa
from lesa_kernels import LesaWarning, Plan, Schedule, Session, TaylorSeer, session
from lesa_kernels.history import Ring
from lesa_kernels.integrations import adapters, norms, register_adapter
from lesa_kernels.integrations.flux import FLUX, flux_tail
from lesa_kernels.integrations.runs import Forecast

STEPS = 10
FULL = (0, 1, 5)
SPARSE = Schedule.explicit(STEPS, FULL)
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]


class Stepwise(TaylorSeer):
    """One launch a step."""

    def plan(self, sigmas: Sequence[float], schedule: Any = None, **options: Any) -> Plan:
        return super().plan(sigmas, schedule, **options | {"chunk": 1})


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fuse features of any size; the steps whose norm was fused."""
    steps: list[int] = []
    forecast_norm = Session.forecast_norm

    def noted(self: Session, step: int, *arguments: Any) -> Tensor:
        steps.append(step)
        return forecast_norm(self, step, *arguments)

    monkeypatch.setattr(norms, "_smallest", lambda device_type: 0)
    monkeypatch.setattr(Session, "forecast_norm", noted)
    return steps


@contextmanager
def plain() -> Iterator[None]:
    """Let modules alone run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(norms, "_smallest", lambda device_type: math.inf)
        yield


def sample(model: Callable[..., Any], batch: int = 2) -> list[Tensor]:
    latents = torch.randn(batch, 6, 4, generator=torch.Generator().manual_seed(1))
    return [model(**call_arguments(latents, SIGMAS[step])).sample for step in range(STEPS)]


@pytest.mark.parametrize("predictor", [TaylorSeer(1), Stepwise(1)], ids=["segments", "steps"])
def test_every_forecast_step_is_fused_and_close_to_the_modules(
    pipe: TinyPipeline, fused: list[int], predictor: TaylorSeer
) -> None:
    lesa.enable(pipe, predictor, SPARSE)
    got = pipe(STEPS, batch=2)
    assert fused == [step for step in range(STEPS) if step not in FULL]
    assert lesa.summary(pipe).refused is None
    with plain():
        torch.testing.assert_close(got, pipe(STEPS, batch=2), rtol=1e-5, atol=1e-5)
    assert len(fused) == STEPS - len(FULL)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_norm_is_nearer_to_float64_than_the_modules(dtype: torch.dtype, chunk: int | None) -> None:
    norm = AdaLayerNormContinuous(WIDTH, 8, elementwise_affine=False, eps=1e-6).to(dtype)
    run = Session(TaylorSeer(1).plan(SIGMAS, SPARSE, chunk=chunk))
    for step in (0, 1):
        run.push(step, torch.randn(2, 50, WIDTH).to(dtype))
    embedding = torch.randn(2, 8).to(dtype)
    scale, shift = norm.linear(norm.silu(embedding)).double().chunk(2, dim=1)
    got = norms.normed(norm, Forecast(run, 2), embedding)
    feature = run.forecast(2)
    want = nn.functional.layer_norm(feature.double(), (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    modules = norms.normed(norm, feature, embedding)
    assert got.dtype == modules.dtype == dtype
    error, of_modules = ((each.double() - want).abs().max() for each in (got, modules))
    # In one pass it is the norm of the forecast before its own rounding.
    assert error < of_modules * (1.5 if chunk or dtype == torch.float32 else 0.7)


def hook(model: Any) -> None:
    model.norm_out.register_forward_hook(lambda *_: None)


def pre_hook(model: Any) -> None:
    model.norm_out.register_forward_pre_hook(lambda *_: None)


def hook_within(model: Any) -> None:
    model.norm_out.norm.register_forward_hook(lambda module, args, output: output * 2)


def wrapped_forward(model: Any) -> None:
    forward = model.norm_out.forward
    model.norm_out.forward = lambda *args: forward(*args) * 2


def compiled_norm(model: Any) -> None:
    model.norm_out.compile(backend="eager")


def wrapped_norm(model: Any) -> None:
    model.norm_out = torch.compile(model.norm_out, backend="eager")


def affine(model: Any) -> None:
    model.norm_out = AdaLayerNormContinuous(WIDTH, WIDTH, elementwise_affine=True)
    nn.init.normal_(model.norm_out.norm.weight)


def rms(model: Any) -> None:
    model.norm_out = AdaLayerNormContinuous(WIDTH, WIDTH, elementwise_affine=False, norm_type="rms_norm")


def own_layer_norm(model: Any) -> None:
    class Doubled(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model.norm_out.norm = Doubled(WIDTH, elementwise_affine=False)


def subclass(model: Any) -> None:
    class Doubled(AdaLayerNormContinuous):
        def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
            return 2 * super().forward(x, embedding)

    model.norm_out.__class__ = Doubled


@pytest.mark.parametrize(
    "change",
    [
        hook,
        pre_hook,
        hook_within,
        wrapped_forward,
        compiled_norm,
        wrapped_norm,
        affine,
        rms,
        own_layer_norm,
        subclass,
    ],
)
def test_a_norm_that_is_not_the_plain_one_is_called(change: Callable[[Any], None], fused: list[int]) -> None:
    model = tiny_transformer()
    change(model)
    lesa.enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    got = sample(model)
    assert not fused and lesa.summary(model).forecast == STEPS - len(FULL)
    with plain():
        assert all(map(torch.equal, got, sample(model)))


def on_all_modules() -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.callback(nn.modules.module.register_module_forward_hook(lambda *_: None).remove)
    return stack


# torch's own remark on RMS norms under autocast.
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize(
    "surroundings", [on_all_modules, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["global hook", "autocast"]
)
def test_a_norm_that_means_something_else_just_now_is_called(
    surroundings: Callable[[], AbstractContextManager[Any]], fused: list[int]
) -> None:
    model = tiny_transformer()
    lesa.enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    with surroundings():
        sample(model)
    assert not fused
    sample(model)
    assert fused


def test_recorded_features_are_those_that_are_normed(fused: list[int]) -> None:
    model = tiny_transformer()
    lesa.enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    outputs = sample(model)
    count = len(fused)
    with lesa.recorded(model) as features:
        torch.testing.assert_close(sample(model), outputs)
    assert len(features) == STEPS and len(fused) == count > 0
    latents = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1))
    exact = copy.deepcopy(model).double()
    for step in range(STEPS):
        arguments = call_arguments(latents.double(), SIGMAS[step]) | {"guidance": torch.full((2,), 3.5).double()}
        (want,) = flux_tail(exact, features[step].double(), return_dict=False, **arguments)
        torch.testing.assert_close(outputs[step].double(), want, rtol=1e-4, atol=1e-4)


def test_lora_on_the_projection_of_the_embedding_counts(pipe: TinyPipeline, fused: list[int]) -> None:
    lesa.enable(pipe, TaylorSeer(1), SPARSE)
    without = pipe(STEPS)
    add_lora(pipe, "style")
    fused.clear()
    tuned = pipe(STEPS)
    assert len(fused) == STEPS - len(FULL) and not torch.allclose(tuned, without, rtol=1e-2)
    with plain():
        torch.testing.assert_close(tuned, pipe(STEPS), rtol=1e-5, atol=1e-5)


def test_hooks_of_the_projections_run(fused: list[int]) -> None:
    model = tiny_transformer()
    called: list[str] = []
    for name in ("time_text_embed", "norm_out.linear", "proj_out"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    lesa.enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    sample(model)
    assert called == ["time_text_embed", "norm_out.linear", "proj_out"] * STEPS
    assert len(fused) == STEPS - len(FULL)


def test_weights_that_are_cast_when_they_are_called(pipe: TinyPipeline, fused: list[int]) -> None:
    pipe.transformer.enable_layerwise_casting(
        storage_dtype=torch.bfloat16, compute_dtype=torch.float32, skip_modules_pattern=()
    )
    lesa.enable(pipe, TaylorSeer(1), SPARSE)
    got = pipe(STEPS)
    with plain():
        torch.testing.assert_close(got, pipe(STEPS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"history_dtype": torch.bfloat16}, {"history_device": "cpu"}], ids=str)
def test_a_history_of_another_kind(
    pipe: TinyPipeline, fused: list[int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The feature is handed out as before; its norm is fused all the same."""
    monkeypatch.setattr(session, "lies_elsewhere", lambda device: True)
    for predictor in (TaylorSeer(1), Stepwise(1)):
        fused.clear()
        lesa.enable(pipe, predictor, SPARSE, **options)
        with pytest.warns(LesaWarning, match="copied from and to") if "history_device" in options else ExitStack():
            got = pipe(STEPS)
            assert len(fused) == STEPS - len(FULL)
            with plain():
                torch.testing.assert_close(got, pipe(STEPS), rtol=1e-5, atol=1e-5)


def test_one_noise_level_for_a_batch(fused: list[int]) -> None:
    model = tiny_transformer()

    def shared(**arguments: Any) -> Any:
        first = {name: arguments[name][:1] for name in ("timestep", "guidance", "pooled_projections")}
        return model(**arguments | first)

    lesa.enable(model, Stepwise(1), SPARSE, sigmas=SIGMAS)
    got = sample(shared)
    assert len(fused) == STEPS - len(FULL)
    with plain():
        torch.testing.assert_close(got, sample(shared), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("when", ["in place", "wrapped", "in place, later", "wrapped, later"])
def test_a_compiled_tail_fuses_its_norm_itself(fused: list[int], when: str) -> None:
    torch._dynamo.reset()
    predictor = Stepwise(1)
    model: FluxTransformer2DModel = tiny_transformer()
    called: Any = model
    expected = accelerated(model, predictor)
    later = "later" in when
    if later:
        lesa.enable(model, predictor, SPARSE, sigmas=SIGMAS)
    if "in place" in when:
        model.compile(backend="eager", fullgraph=not later)
    else:
        called = torch.compile(model, backend="eager", fullgraph=not later)
    if not later:
        lesa.enable(called, predictor, SPARSE, sigmas=SIGMAS)
    fused.clear()
    torch.testing.assert_close(sample(called), expected)
    assert not fused and lesa.summary(called).forecast == STEPS - len(FULL)


def test_compiled_blocks_leave_the_tail_as_it_is(fused: list[int]) -> None:
    torch._dynamo.reset()
    model = tiny_transformer()
    expected = accelerated(model, TaylorSeer(1))
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    fused.clear()
    torch.testing.assert_close(accelerated(model, TaylorSeer(1)), expected)
    assert len(fused) == STEPS - len(FULL)


def accelerated(model: FluxTransformer2DModel, predictor: TaylorSeer) -> list[Tensor]:
    with lesa.enabled(model, predictor, SPARSE, sigmas=SIGMAS):
        return sample(model)


def test_adapters_of_users_get_a_feature(fused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Any] = []

    def own_tail(model: Any, feature: Tensor, **arguments: Any) -> Any:
        received.append(feature)
        return flux_tail(model, feature, **arguments)

    monkeypatch.setattr(adapters, "_ADAPTERS", dict(adapters._ADAPTERS))
    for skip, count in ((own_tail, STEPS - len(FULL)), (None, 0)):
        register_adapter(replace(FLUX, skip=skip))
        received.clear()
        accelerated(tiny_transformer(), TaylorSeer(1))
        assert not fused and len(received) == count
        assert all(isinstance(feature, Tensor) for feature in received)


def test_a_forecast_that_fails_costs_no_image(
    pipe: TinyPipeline, fused: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = pipe(STEPS)
    lesa.enable(pipe, TaylorSeer(1), SPARSE)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 1 GiB")

    monkeypatch.setattr(Ring, "forecast", fail)
    with pytest.warns(LesaWarning, match="the feature of step 2 could not be forecast: tried to allocate"):
        assert torch.equal(pipe(STEPS), expected)
    assert not fused


@pytest.mark.parametrize("at", [2, 7])
def test_a_norm_that_fails_costs_no_image(pipe: TinyPipeline, fused: list[int], at: int, monkeypatch: Any) -> None:
    """The memory may end within the model's tail, in the middle of a run."""
    lesa.enable(pipe, TaylorSeer(1), SPARSE)
    forecast_norm = Session.forecast_norm

    def fail(self: Session, step: int, *arguments: Any) -> Tensor:
        if step == at:
            raise torch.OutOfMemoryError("tried to allocate 1 GiB")
        return forecast_norm(self, step, *arguments)

    monkeypatch.setattr(Session, "forecast_norm", fail)
    with pytest.warns(LesaWarning, match=f"the feature of step {at} could not be forecast: tried to allocate"):
        got = pipe(STEPS)
    forecast = len([step for step in range(at) if step not in FULL])
    assert (lesa.summary(pipe).forecast, lesa.summary(pipe).full) == (forecast, STEPS - forecast)
    with plain():
        lesa.enable(pipe, TaylorSeer(1), Schedule.explicit(STEPS, sorted({*FULL, *range(at, STEPS)})))
        torch.testing.assert_close(got, pipe(STEPS), rtol=1e-5, atol=1e-5)


def test_small_features_and_devices_without_a_measurement_are_left_to_the_modules(pipe: TinyPipeline) -> None:
    assert norms._smallest("cuda") == norms._smallest("mps") == math.inf
    served = {each.op: each.kernel for each in lesa.status().kernels if each.device == "CPU"}
    assert norms._smallest("cpu") == (262144 if "C++" in served["forecast_norm"] else math.inf)
    lesa.enable(pipe, TaylorSeer(1), SPARSE)
    with plain():
        expected = pipe(STEPS)
    assert torch.equal(pipe(STEPS), expected)


@pytest.mark.skipif(norms._smallest("cpu") == math.inf, reason="needs the C++ kernel of forecast_norm")
def test_large_features_are_fused_where_that_was_measured() -> None:
    latents = torch.empty(1, 4096, 64)
    model = nn.Module()
    model.norm_out = AdaLayerNormContinuous(3072, 8, elementwise_affine=False, eps=1e-6)
    assert norms.NormTail.fuses(model, latents)
    assert not norms.NormTail.fuses(model, latents[:, :64])
    assert not norms.NormTail.fuses(model, latents.to("meta"))

"""Every transformer that is served, as a tiny model of the real class: full steps, forecast steps, and no trace."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import MODELS, VARIANTS, at_step, block_calls, sample_of
from torch import Tensor, nn

from lesa_kernels import Reuse, Schedule, TaylorSeer
from lesa_kernels.integrations import disable, enable, recorded, summary
from lesa_kernels.integrations.cache_hooks import find_hook
from lesa_kernels.integrations.models import find_adapter

STEPS = 6
FULL = (0, 1, 4)
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
SPARSE = Schedule.explicit(STEPS, FULL)
EVERY = Schedule.explicit(STEPS, range(STEPS))

FAST = {"flux": "norm_out", "qwen": "proj_out", "hunyuan": ""}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def sample(model: nn.Module, name: str, steps: int = STEPS) -> list[Tensor]:
    """A call for each step, every one with latents of its own."""
    calls = [at_step(MODELS[name], step, SIGMAS[step]) for step in range(steps)]
    return [sample_of(model(**call, return_dict=False)) for call in calls]


@pytest.mark.parametrize("name", MODELS)
def test_full_steps_keep_their_bits(name: str) -> None:
    model = MODELS[name].model()
    plain = sample(model, name)
    enable(model, Reuse(), EVERY, sigmas=SIGMAS)
    assert all(map(torch.equal, plain, sample(model, name)))
    assert summary(model).refused is None


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS | VARIANTS)
def test_the_captured_feature_alone_gives_the_full_output(name: str, dtype: torch.dtype, return_dict: bool) -> None:
    """The second call has the inputs of the first, is a forecast step and reuses its feature: the bits are the same."""
    tiny = (MODELS | VARIANTS)[name]
    model = tiny.model().to(dtype)
    arguments = {key: _converted(value, dtype) for key, value in tiny.arguments(0).items()}
    enable(model, Reuse(), Schedule.explicit(2, [0]), sigmas=[1.0, 0.5, 0.0])
    full = model(**arguments, return_dict=return_dict)
    with block_calls(model) as calls:
        forecast = model(**arguments, return_dict=return_dict)
    assert not calls
    assert type(forecast) is type(full)
    assert torch.equal(sample_of(forecast), sample_of(full))
    assert summary(model).forecast == 1


def _converted(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_converted(each, dtype) for each in value]
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize("name", MODELS)
def test_blocks_run_on_full_steps_alone(name: str) -> None:
    model = MODELS[name].model()
    with block_calls(model) as calls:
        plain = sample(model, name)
        in_full = len(calls)
        enable(model, TaylorSeer(), SPARSE, sigmas=SIGMAS)
        calls.clear()
        accelerated = sample(model, name)
    assert len(calls) * STEPS == in_full * len(FULL)
    for step in range(STEPS):
        assert torch.equal(accelerated[step], plain[step]) == (step in FULL)
    assert (summary(model).full, summary(model).forecast) == (3, 3)


@pytest.mark.parametrize("name", MODELS)
def test_forecasts_are_made_of_the_captured_features(name: str) -> None:
    """At the capture point a forecast step has the formula's value, which what follows receives."""
    model = MODELS[name].model()
    enable(model, TaylorSeer(order=1, variable="sigma"), SPARSE, sigmas=SIGMAS)
    capture = find_adapter(model).capture
    received: list[Tensor] = []
    if capture:
        model.get_submodule(capture).register_forward_pre_hook(lambda _, args: received.append(args[0].clone()))
        sample(model, name)
        if name not in FAST:
            # An adapter made from the model's structure is tried out once, on the first step.
            assert torch.equal(received.pop(1), received[0])
    else:
        received = sample(model, name)
    assert len(received) == STEPS
    for step in (2, 3, 5):
        old, new = (0, 1) if step < 4 else (1, 4)
        slope = (received[new] - received[old]) / (SIGMAS[new] - SIGMAS[old])
        expected = received[new] + (SIGMAS[step] - SIGMAS[new]) * slope
        torch.testing.assert_close(received[step], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_disable_leaves_no_trace(name: str) -> None:
    model = MODELS[name].model()
    plain, before = sample(model, name), _state(model)
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    assert _state(model) != before
    assert not all(map(torch.equal, plain, sample(model, name)))
    disable(model)
    assert _state(model) == before
    assert all(map(torch.equal, plain, sample(model, name)))


def _state(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a model is made of: the modules with their attributes, and the hooks on them."""
    return {
        name: {
            key: list(value) if isinstance(value, dict) else id(value)
            for key, value in vars(module).items()
            if key not in ("_buffers", "_non_persistent_buffers_set")
        }
        | {"type": type(module)}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize(("name", "capture"), FAST.items())
def test_published_models_are_captured_where_lesa_was_trained(name: str, capture: str) -> None:
    adapter = find_adapter(MODELS[name].model())
    assert adapter.capture == capture
    assert adapter.blocks == (
        ("transformer_blocks",) if name == "qwen" else ("transformer_blocks", "single_transformer_blocks")
    )


@pytest.mark.parametrize("name", FAST)
def test_a_published_model_computes_no_more_than_its_tail(name: str) -> None:
    model = MODELS[name].model()
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    sample(model, name, steps=2)
    called: list[str] = []
    for path, module in model.named_children():
        module.register_forward_hook(lambda *_, path=path: called.append(path))
    model(**MODELS[name].arguments(2))
    assert called == {"flux": ["time_text_embed", "norm_out", "proj_out"], "qwen": ["proj_out"], "hunyuan": []}[name]


def test_a_caller_may_write_to_an_output_that_was_forecast() -> None:
    model = MODELS["hunyuan"].model()
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    expected = sample(model, "hunyuan")
    outputs = []
    for step in range(STEPS):
        output = model(**MODELS["hunyuan"].arguments(step)).sample
        outputs.append(output.clone())
        output.zero_()
    assert all(map(torch.equal, outputs, expected))


# The argument for residuals, and the shape of one for the first block.
CONTROL: dict[str, tuple[str, tuple[int, ...]]] = {
    "flux": ("controlnet_block_samples", (2, 6, 32)),
    "qwen": ("controlnet_block_samples", (2, 6, 32)),
    "sd3": ("block_controlnet_hidden_states", (2, 4, 32)),
    "z_image": ("controlnet_block_samples", (2, 64, 32)),
}


@pytest.mark.parametrize("name", CONTROL)
def test_residuals_of_a_controlnet_are_part_of_the_feature(name: str) -> None:
    model, tiny = MODELS[name].model(), MODELS[name]
    argument, shape = CONTROL[name]
    residual = torch.randn(shape)  # no constant, which the next layer norm would remove
    residuals = {0: residual} if name == "z_image" else [residual]
    plain = sample_of(model(**tiny.arguments(0)))
    enable(model, Reuse(), Schedule.explicit(2, [0]), sigmas=[1.0, 0.5, 0.0])
    full = sample_of(model(**tiny.arguments(0), **{argument: residuals}))
    assert (full - plain).norm() > 0.01 * plain.norm()
    assert torch.equal(sample_of(model(**tiny.arguments(0), **{argument: residuals})), full)
    assert (summary(model).full, summary(model).forecast) == (1, 1)


def test_features_of_a_model_without_an_entry_can_be_recorded() -> None:
    """The recorder came first; it sees forecasts all the same, and the trial of the first step once."""
    model = MODELS["wan"].model()
    with recorded(model) as features:
        enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
        sample(model, "wan")
    assert len(features) == STEPS
    assert torch.equal(features[2], features[1])
    assert not torch.equal(features[1], features[0])


def test_a_list_of_images_that_changes_is_noticed() -> None:
    """Z-Image takes one tensor for each image."""
    model, arguments = MODELS["z_image"].model(), MODELS["z_image"].arguments
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    sample(model, "z_image", steps=3)
    one = {key: value[:1] for key, value in arguments(3).items()}
    with pytest.warns(UserWarning, match="latents changed"):
        output = sample_of(model(**one))
    disable(model)
    assert torch.equal(output, sample_of(model(**one)))


def test_two_transformers_are_planned_each_from_its_first_step() -> None:
    """Wan 2.2: one for high noise, one for low."""
    high, low = MODELS["wan"].model(), MODELS["wan"].model()
    root = None
    for model in (high, low):
        enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
        assert find_hook(model) is not root
        root = find_hook(model)
    with block_calls(high) as in_high, block_calls(low) as in_low:
        for step in range(STEPS):
            model = high if step < 3 else low
            with model.cache_context("cond", step_index=step):
                model(**MODELS["wan"].arguments(step))
    assert (len(in_high), len(in_low)) == (2 * 2, 2 * 2)
    assert (summary(low).full, summary(low).forecast) == (2, 1)

"""FLUX's tail on forecast steps: it calls the model's own final norm and projection, whatever these are by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous
from tiny_flux import WIDTH, TinyPipeline, add_lora, call_arguments, tiny_transformer
from torch import Tensor, nn

import lesa_kernels as lesa
from lesa_kernels import Schedule, TaylorSeer

STEPS = 10
FULL = (0, 1, 5)
SPARSE = Schedule.explicit(STEPS, FULL)
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def arguments_of(step: int) -> dict[str, Any]:
    return call_arguments(torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)), SIGMAS[step])


def check_outputs(model: FluxTransformer2DModel) -> None:
    """Compare all steps with what the model's modules make of the features of these steps."""
    lesa.enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    with lesa.recorded(model) as features:
        outputs = [model(**arguments_of(step)).sample for step in range(STEPS)]
    assert lesa.summary(model).forecast == STEPS - len(FULL) == len(features) - len(FULL)
    lesa.disable(model)
    for step, (feature, output) in enumerate(zip(features, outputs, strict=True)):
        arguments = arguments_of(step)
        times = [arguments[name].to(feature.dtype) * 1000 for name in ("timestep", "guidance")]
        embedding = model.time_text_embed(*times, arguments["pooled_projections"])
        torch.testing.assert_close(output, model.proj_out(model.norm_out(feature, embedding)), rtol=1e-5, atol=1e-5)


def hook(model: Any) -> None:
    model.norm_out.register_forward_hook(lambda module, args, output: output * 2)


def pre_hook(model: Any) -> None:
    model.norm_out.register_forward_pre_hook(lambda module, args: (args[0], args[1] * 2))


def hook_within(model: Any) -> None:
    model.norm_out.norm.register_forward_hook(lambda module, args, output: output * 2)


def hook_of_the_projection(model: Any) -> None:
    model.norm_out.linear.register_forward_hook(lambda module, args, output: output * 2)


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


def subclass(model: Any) -> None:
    class Doubled(AdaLayerNormContinuous):
        def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
            return 2 * super().forward(x, embedding)

    model.norm_out.__class__ = Doubled


CHANGES = [
    hook,
    pre_hook,
    hook_within,
    hook_of_the_projection,
    wrapped_forward,
    compiled_norm,
    wrapped_norm,
    affine,
    rms,
    subclass,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_norm_of_any_kind_is_called(change: Callable[[Any], None]) -> None:
    model = tiny_transformer()
    change(model)
    check_outputs(model)


def on_all_modules() -> AbstractContextManager[Any]:
    stack = ExitStack()
    double = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if isinstance(module, nn.LayerNorm) else None
    )
    stack.callback(double.remove)
    return stack


# torch's own remark on RMS norms under autocast.
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize(
    "surroundings",
    [nullcontext, on_all_modules, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["none", "global hook", "autocast"],
)
def test_a_norm_means_what_its_surroundings_say(surroundings: Callable[[], AbstractContextManager[Any]]) -> None:
    with surroundings():
        check_outputs(tiny_transformer())


def test_lora_on_the_projection_of_the_embedding_counts(pipe: TinyPipeline) -> None:
    add_lora(pipe, "style")
    assert type(pipe.transformer.norm_out.linear) is not nn.Linear
    check_outputs(pipe.transformer)


def test_weights_that_are_cast_when_they_are_called() -> None:
    model = tiny_transformer()
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32, skip_modules_pattern=())
    check_outputs(model)


def test_one_noise_level_for_a_batch() -> None:
    model = tiny_transformer()
    lesa.enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)

    def sample(count: int) -> list[Tensor]:
        shared = {"timestep", "guidance", "pooled_projections"}
        calls = map(arguments_of, range(STEPS))
        return [
            model(**{name: value[:count] if name in shared else value for name, value in call.items()}).sample
            for call in calls
        ]

    for shared, separate in zip(sample(1), sample(2), strict=True):
        torch.testing.assert_close(shared, separate, rtol=1e-5, atol=1e-5)

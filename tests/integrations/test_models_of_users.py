"""Models without an entry: what is found by itself, what a user says, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel, WanTransformer3DModel
from tiny_flux import tiny_transformer
from tiny_models import MODELS, at_step, block_calls, sample_of
from torch import Tensor, nn

from lesa_kernels import Reuse, Schedule
from lesa_kernels.integrations import Adapter, LesaWarning, disable, enable, models, register_adapter, summary
from lesa_kernels.integrations.cache_hooks import find_hook
from lesa_kernels.integrations.models import MODEL_OUTPUT, find_adapter

STEPS = 4
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
SPARSE = Schedule.explicit(STEPS, [0, 2])
CHANNELS = 4


@pytest.fixture(autouse=True)
def without_gradients(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(models, "_ADAPTERS", dict(models._ADAPTERS))
    with torch.no_grad():
        yield


class Own(nn.Module):
    """A transformer as users write them, with a nested list of blocks and a head of its own name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(CHANNELS, CHANNELS)
        self.body = nn.Module()
        self.body.stages = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.head = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        hidden = self.embed(x)
        for stage in self.body.stages:
            hidden = stage(hidden).relu()
        return (self.head(hidden) + x,)


class Usual(Own):
    """The same with the usual names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm_out = self.body.stages, self.head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden).relu()
        return (self.norm_out(hidden) + x,)


class TwoStreams(Usual):
    """What its blocks return goes two ways, as picture and sound do in LTX-2."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = self.embed(x)
        for block in self.blocks:
            hidden = block(hidden).relu()
        return self.norm_out(hidden) + x, self.norm_out(hidden + 1) + x


class TwoStreamsInPlace(TwoStreams):
    """It returns the same memory every time, as a CUDA graph does."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = super().forward(x)
        self.memory = getattr(self, "memory", outputs)
        for kept, output in zip(self.memory, outputs, strict=True):
            kept.copy_(output)
        return self.memory


class NeedsItsBlocks(Usual):
    """It reads a variable that only its loop sets."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        for block in self.blocks:
            hidden = block(x).relu()
        return (self.norm_out(hidden) + x,)


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, CHANNELS, generator=generator) for _ in range(STEPS)]


def sample(model: nn.Module) -> list[Tensor]:
    return [model(x)[0] for x in inputs()]


def count(model: nn.Module, calls: list[nn.Module]) -> None:
    for stage in model.body.stages:
        stage.register_forward_hook(lambda module, *_: calls.append(module))


def reused(model: Own) -> list[Tensor]:
    """What `sample` must give with `Reuse` and SPARSE, by hand."""
    features = []
    for x in inputs():
        hidden = model.embed(x)
        for stage in model.body.stages:
            hidden = stage(hidden).relu()
        features.append(hidden)
    return [model.head(features[step - step % 2]) + x for step, x in enumerate(inputs())]


def test_an_adapter_takes_a_line() -> None:
    register_adapter(Adapter("Own", capture="head", blocks=("body.stages",)))
    model, calls = Own(), []
    expected = reused(model)
    count(model, calls)
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    assert all(map(torch.equal, sample(model), expected))
    assert len(calls) == 2 * 3
    assert summary(model).skipped_blocks == 2 * 3
    assert type(model.body.stages) is nn.ModuleList


def test_the_usual_names_need_no_adapter() -> None:
    model, calls = Usual(), []
    expected = reused(model)
    count(model, calls)
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    assert all(map(torch.equal, sample(model), expected))
    assert len(calls) == 2 * 3


def test_a_subclass_is_served_by_the_entry_of_its_base() -> None:
    register_adapter(Adapter("Own", capture="embed", blocks=("body.stages",)))
    assert find_adapter(Usual()).capture == "embed"


def test_a_user_may_capture_elsewhere() -> None:
    model = MODELS["wan"].model()
    plain = sample_of(model(**at_step(MODELS["wan"], 0, SIGMAS[0])))
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS, capture="proj_out")
    outputs = [sample_of(model(**at_step(MODELS["wan"], step, SIGMAS[step]))) for step in range(2)]
    # Behind all modulation nothing depends on the noise level any more.
    assert torch.equal(outputs[0], plain)
    assert torch.equal(outputs[1], outputs[0])
    assert summary(model).forecast == 1


def test_any_output_of_one_tensor_can_be_the_feature() -> None:
    model = MODELS["wan"].model()
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS, capture=MODEL_OUTPUT)
    with block_calls(model) as calls:
        outputs = [model(**at_step(MODELS["wan"], step, SIGMAS[step])).sample for step in range(STEPS)]
    assert len(calls) == 2 * 2
    assert [torch.equal(outputs[step], outputs[step - step % 2]) for step in range(STEPS)] == [True] * STEPS


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (TwoStreams, "gives another output"),
        (TwoStreamsInPlace, "gives another output"),
        (NeedsItsBlocks, "fails .Unbound"),
    ],
)
def test_a_model_that_is_more_than_its_capture_point_is_refused(kind: type[Usual], reason: str) -> None:
    model = kind()
    plain = [output.clone() for x in inputs() for output in model(x)]
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    with pytest.warns(LesaWarning, match=f"{kind.__name__}, given the feature captured at 'norm_out'.*{reason}"):
        outputs = [output.clone() for x in inputs() for output in model(x)]
    assert all(map(torch.equal, outputs, plain))
    assert summary(model).forecast == 0


def test_a_model_of_picture_and_sound_keeps_both() -> None:
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=1,
        caption_channels=8,
    ).eval()
    arguments = {
        "hidden_states": torch.randn(1, 12, 4),
        "audio_hidden_states": torch.randn(1, 5, 4),
        "encoder_hidden_states": torch.randn(1, 3, 8),
        "audio_encoder_hidden_states": torch.randn(1, 3, 8),
        "timestep": torch.tensor([500.0]),
        "sigma": torch.tensor([0.5]),
        "num_frames": 2,
        "height": 2,
        "width": 3,
        "audio_num_frames": 5,
    }
    plain = model(**arguments)
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    with pytest.warns(LesaWarning, match="gives another output"):
        first = model(**arguments)
    for output in (first, model(**arguments)):
        assert all(map(torch.equal, output.to_tuple(), plain.to_tuple()))


def test_an_output_of_several_tensors_is_no_feature() -> None:
    model = TwoStreams()
    plain = sample(model)
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS, capture=MODEL_OUTPUT)
    with pytest.warns(LesaWarning, match="must return a Transformer2DModelOutput or a tuple of one tensor, TwoStreams"):
        assert all(map(torch.equal, sample(model), plain))


@pytest.mark.parametrize(
    ("capture", "adapter", "message"),
    [
        (None, None, r"no adapter for Own; .* no submodule 'norm_out' to capture at; capture=.* names another one"),
        ("tail", None, r"Own: the model has no submodule 'tail'"),
        ("head", None, r"Own has no list of blocks: .*register_adapter\(Adapter\('Own', blocks=\(\.\.\.\)\)\)"),
        (None, Adapter("Own", capture="head", blocks=("body",)), "body must be an nn.ModuleList of blocks, got Module"),
        (None, Adapter("Own", capture="head", blocks=("body.nope",)), "there is no 'body.nope'"),
    ],
)
def test_a_structure_that_is_not_understood_is_refused_at_once(
    capture: str | None, adapter: Adapter | None, message: str
) -> None:
    if adapter is not None:
        register_adapter(adapter)
    model = Own()
    with pytest.raises(ValueError, match=message):
        enable(model, Reuse(), SPARSE, sigmas=SIGMAS, capture=capture)
    assert find_hook(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())


class LowRank(nn.Module):
    """Wraps a layer as LoRA does: what it adds reads the layer's input too."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.update = nn.Linear(CHANNELS, CHANNELS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.update(x)


def test_a_module_that_is_wrapped_later_gets_the_forecast_as_a_whole() -> None:
    model = Usual()
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    sample(model)
    base = model.norm_out
    model.norm_out = model.head = LowRank(base)
    outputs = sample(model)
    disable(model)
    assert all(map(torch.equal, outputs, reused(model)))
    assert not base._forward_pre_hooks
    assert not model.norm_out._forward_pre_hooks


def test_an_exception_in_a_forecast_step_leaves_the_blocks_in_place() -> None:
    model = MODELS["sd3"].model()
    second = at_step(MODELS["sd3"], 1, SIGMAS[1])
    blocks, plain = model.transformer_blocks, sample_of(model(**second))
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    model(**at_step(MODELS["sd3"], 0, SIGMAS[0]))
    handle = model.proj_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**second)
    handle.remove()
    assert model.transformer_blocks is blocks
    # The next call begins a new run, with a full step.
    assert torch.equal(sample_of(model(**second)), plain)


def test_subclasses_of_diffusers_models_are_found() -> None:
    class Finetuned(WanTransformer3DModel):
        pass

    model = Finetuned(num_attention_heads=2, attention_head_dim=16, in_channels=4, text_dim=8, num_layers=1, ffn_dim=8)
    found = find_adapter(model)
    assert (found.capture, found.blocks, found.tail) == ("norm_out", ("blocks",), None)


def test_a_list_of_modules_is_no_capture_point() -> None:
    with pytest.raises(ValueError, match=r"capture must be a submodule that is called, '\w+' is a ModuleList"):
        enable(tiny_transformer(), Reuse(), SPARSE, sigmas=SIGMAS, capture="transformer_blocks")


@pytest.mark.parametrize(
    "make", [lambda: Own, lambda: Adapter(Own), lambda: Adapter("Own", blocks="body")], ids=["class", "model", "blocks"]
)
def test_an_adapter_of_something_else_is_refused(make: Callable[[], Adapter]) -> None:
    with pytest.raises(TypeError, match="must be"):
        register_adapter(make())

"""A source encodes each batch of texts once, and its runs are those that encode them every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="diffusers' pipelines import transformers")

import tokenizers
import transformers
from tiny_sources import STEPS, Case, flux_case, in_full, odd_pipeline, wan_case

from lesa_kernels import Schedule
from lesa_kernels.integrations import PipelineSource
from lesa_kernels.integrations.pipeline_source import EncodedPrompts
from lesa_kernels.training import SolverFits

TEXTS = ["red fox", "blue", "red"]
SCHEDULE = Schedule.explicit(STEPS, [0, 2, 4])


def _tokenizer() -> Any:
    words = ["_", "?", "red", "blue", "fox", "ugly"]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="?")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", pad_token="_", model_max_length=4)


def _t5() -> nn.Module:
    torch.manual_seed(3)
    config = transformers.T5Config(vocab_size=6, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config).eval()


def _clip() -> nn.Module:
    torch.manual_seed(4)
    config = transformers.CLIPTextConfig(
        vocab_size=6,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=4,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.CLIPTextModel(config).eval()


def _as_texts(case: Case, **arguments: Any) -> Case:
    """Return a case whose prompts are texts, without embeddings."""
    kept = {name: value for name, value in case.arguments.items() if "embeds" not in name}
    return Case(case.pipe, [{"prompt": text} for text in TEXTS], kept | arguments)


def flux_texts() -> Case:
    case = flux_case()
    case.pipe.register_modules(text_encoder=_clip(), text_encoder_2=_t5(), tokenizer=_tokenizer())
    case.pipe.register_modules(tokenizer_2=_tokenizer())
    case.pipe.tokenizer_max_length = 4
    return _as_texts(case, max_sequence_length=4, true_cfg_scale=3.0, negative_prompt="ugly")


def wan_texts() -> Case:
    case = wan_case()
    case.pipe.register_modules(text_encoder=_t5(), tokenizer=_tokenizer())
    return _as_texts(case, max_sequence_length=4, negative_prompt="ugly")


def _count(*models: nn.Module) -> list[nn.Module]:
    """Return a list to which each call of a model is added."""
    calls: list[nn.Module] = []
    for model in models:
        model.register_forward_hook(lambda module, *_: calls.append(module))
    return calls


# The noise levels are read from a run of the first text alone; then come a batch of two, and one. FLUX encodes the
# negative texts in a call of their own, and finds those of the last batch among the kept.
@pytest.mark.parametrize(("make", "count"), [(flux_texts, 3 + 2), (wan_texts, 3 + 3)])
def test_a_fit_encodes_each_batch_of_texts_once(
    make: Callable[[], Case], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make()
    calls = _count(case.pipe.text_encoder)
    source = case.source()
    fitted = SolverFits(source, target=source.refined(2), progress=False, batch=2).fit(SCHEDULE, progress=False)
    assert len(calls) == count
    assert "encode_prompt" not in vars(case.pipe)
    monkeypatch.setattr(EncodedPrompts, "remembered", lambda *_: torch.no_grad())
    source = case.source()
    again = SolverFits(source, target=source.refined(2), progress=False, batch=2).fit(SCHEDULE, progress=False)
    assert len(calls) > 3 * count
    assert torch.equal(fitted.coefficients, again.coefficients)
    assert fitted.guidance == again.guidance


@pytest.mark.parametrize("make", [flux_texts, wan_texts])
def test_runs_are_equal_bit_for_bit(make: Callable[[], Case]) -> None:
    case = make()
    source = case.source()
    for run in (0, 1, 0):
        source.run([run], in_full)
        assert torch.equal(case.latents[-1], case.plain(run))


class _Texts:
    """Stands for a pipeline: what it encodes, and what its `encode_prompt` was called with."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.text_encoder = nn.Linear(2, 2)
        self._execution_device = torch.device("cpu")

    def encode_prompt(self, prompt: Any, device: Any = None, **settings: Any) -> tuple[Any, ...]:
        self.calls.append((prompt, device, settings))
        found = torch.full((2,), float(len(self.calls)))
        return found, None, [found, found + 1]


def test_equal_arguments_are_answered_from_memory() -> None:
    pipe, encoded = _Texts(), EncodedPrompts()
    cpu = torch.device("cpu")
    with encoded.remembered(pipe):
        first = pipe.encode_prompt(["a", "b"], cpu, scale=0.5, other=None)
        again = pipe.encode_prompt(["a", "b"], torch.device("cpu"), other=None, scale=0.5)
        assert len(pipe.calls) == 1
        assert again[1] is None and torch.equal(again[2][0], again[0])
        for found in (first, again):
            assert torch.equal(found[0], torch.ones(2)) and torch.equal(found[2][1], torch.full((2,), 2.0))
            # A pipeline may write to what it got.
            found[0].zero_()
        assert torch.equal(pipe.encode_prompt(["a", "b"], cpu, scale=0.5, other=None)[0], torch.ones(2))
        assert len(pipe.calls) == 1
        for arguments in (
            ["a b"],
            [["a, b"]],
            [["a"], "b"],
            [["a", "b"], "meta"],
            [("a", "b"), cpu],
            [[], True],
            [[], 1],
        ):
            count = len(pipe.calls)
            pipe.encode_prompt(*arguments)
            assert len(pipe.calls) == count + 1, arguments
        count = len(pipe.calls)
        pipe.encode_prompt(["a", "b"], cpu, scale=0.25, other=None)
        assert len(pipe.calls) == count + 1, "a LoRA of another scale"


@pytest.mark.parametrize("other", [torch.zeros(1), [torch.zeros(1)], torch.Generator(), {"a": 1}])
def test_what_cannot_be_compared_is_encoded_every_time(other: Any) -> None:
    pipe, encoded = _Texts(), EncodedPrompts()
    with encoded.remembered(pipe):
        for _ in range(2):
            pipe.encode_prompt("a", other=other)
    assert len(pipe.calls) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: pipe.text_encoder.bfloat16(),
        lambda pipe: setattr(pipe, "_execution_device", torch.device("cuda")),
    ],
    ids=["cast", "moved"],
)
def test_another_type_or_device_is_noticed(change: Callable[[_Texts], Any]) -> None:
    pipe, encoded = _Texts(), EncodedPrompts()
    with encoded.remembered(pipe):
        pipe.encode_prompt("a")
        change(pipe)
        pipe.encode_prompt("a")
    assert len(pipe.calls) == 2


def test_a_lora_that_is_loaded_into_a_text_encoder_is_noticed() -> None:
    peft = pytest.importorskip("peft", reason="diffusers' LoRA needs peft")
    case = flux_texts()
    source = case.source()
    source.run([0], in_full)
    before = case.latents[-1]
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["q", "v"])
    peft.inject_adapter_in_model(config, case.pipe.text_encoder_2)
    source.run([0], in_full)
    assert torch.equal(case.latents[-1], case.plain(0))
    assert not torch.equal(case.latents[-1], before)


def test_encode_prompt_is_left_as_it_was_found() -> None:
    pipe, encoded = _Texts(), EncodedPrompts()
    with pytest.raises(TypeError, match="prompt"), encoded.remembered(pipe):
        pipe.encode_prompt()
    assert "encode_prompt" not in vars(pipe)
    own = pipe.encode_prompt = lambda text: text  # type: ignore[method-assign,assignment]
    with encoded.remembered(pipe):
        assert pipe.encode_prompt("a") == "a"
    assert pipe.encode_prompt is own
    without = odd_pipeline()
    PipelineSource(without, ["one"], steps=2).run([0], in_full)
    assert not hasattr(without, "encode_prompt")


def test_an_offloaded_pipeline_moves_its_models_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate", reason="diffusers' offload needs accelerate")
    case = flux_texts()
    plain = case.plain(0)
    # On the CPU nothing moves, but the hooks are called.
    case.pipe.enable_model_cpu_offload(device="cpu")
    moved: list[str] = []
    before = accelerate.hooks.CpuOffload.pre_forward

    def note(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        moved.append(type(module).__name__)
        return before(hook, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", note)
    denoising = ["FluxTransformer2DModel"] * 2 * STEPS
    assert torch.equal(case.plain(0), plain)
    assert moved == ["CLIPTextModel", "T5EncoderModel"] * 2 + denoising
    source = case.source()
    assert source.sigmas
    moved.clear()
    source.run([0], in_full)
    assert moved == denoising
    assert torch.equal(case.latents[-1], plain)

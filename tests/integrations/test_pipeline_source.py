"""A pipeline as a source: policies answer its calls, see the features, and can run its tail with gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from tiny_pipelines import blocks_of, counting, noise, quiet
from torch import Tensor, nn

pytest.importorskip("transformers", reason="diffusers' pipelines import transformers")

import diffusers
from tiny_sources import (
    BRANCHES,
    CASES,
    SPARSE,
    STEPS,
    Followed,
    flux_case,
    hunyuan_case,
    in_full,
    odd_pipeline,
    qwen_case,
    wan_case,
)

from lesa_kernels import TaylorSeer
from lesa_kernels.integrations import PipelineSource, disable, enable, recorded, summary
from lesa_kernels.integrations.cache_hooks import find_hook
from lesa_kernels.integrations.outputs import only_tensor, refilled
from lesa_kernels.integrations.pipeline_source import load_pipeline
from lesa_kernels.trajectories import ONLY_BRANCH, ModelCall, watch


def check_same(latents: Tensor, expected: Tensor) -> None:
    # torch's convolutions, SD3's first layer, round in another way where their weights take no gradient.
    torch.testing.assert_close(latents, expected, rtol=1e-6, atol=2e-6)


every_case = pytest.mark.parametrize("name", list(CASES))


@every_case
def test_a_policy_that_runs_all_blocks_changes_nothing(name: str) -> None:
    case = CASES[name]()
    plain = case.plain(1)
    with counting(*case.models()) as count:
        case.plain(1)
    once = count.blocks
    with counting(*case.models()) as count:
        check_same(case.run([1], in_full), plain)
        # Not once more in search of the sigmas; where a tail is checked on the first step, that is without blocks.
        assert count.blocks == once


@every_case
def test_forecasts_of_a_plan_give_what_enable_gives(name: str) -> None:
    case = CASES[name]()
    enable(case.pipe, TaylorSeer(2, variable="sigma"), SPARSE)
    expected = case.plain(2)
    full_calls = summary(case.pipe).full
    disable(case.pipe)
    assert not torch.equal(expected, case.plain(2))
    with counting(*case.models()) as count:
        check_same(case.run([2], Followed(case.source())), expected)
    assert count.blocks == full_calls * len(blocks_of(case.pipe.transformer))


@every_case
def test_a_run_is_the_same_in_any_batch(name: str) -> None:
    case = CASES[name]()
    alone = case.run([2], in_full)
    both = case.run([0, 2], in_full)
    assert len(both) == 2 and not torch.allclose(both[0], both[1], atol=1e-2)
    torch.testing.assert_close(both[1:], alone, rtol=1e-3, atol=1e-4)


@every_case
def test_calls_have_step_branch_feature_and_latents(name: str) -> None:
    case = CASES[name]()
    calls: list[tuple[int, str]] = []
    given: list[Tensor] = []
    features: list[Tensor] = []

    def look(call: ModelCall) -> Tensor:
        feature, output = watch(call)
        calls.append((call.step, call.branch))
        assert call.latents is not None and output is not None
        given.append(call.latents)
        features.append(feature)
        assert not feature.requires_grad
        return output

    with recorded(case.pipe) as expected:
        case.plain(0)
    branches = BRANCHES.get(name, ("cond",))
    case.run([0], look)
    assert calls == [(step, branch) for step in range(STEPS) for branch in branches]
    for feature, other in zip(features, expected, strict=False):
        check_same(feature, other)
    per_branch = len(branches)
    # The first latents are the noise; those of the next step are what the pipeline made of the answers.
    assert torch.equal(given[0], given[per_branch - 1])
    assert given[per_branch].shape == given[0].shape and not torch.equal(given[per_branch], given[0])


@every_case
def test_the_tail_has_the_gradient_of_finite_differences(name: str) -> None:
    case = CASES[name]()
    found: dict[str, Tensor] = {}

    def differentiate(call: ModelCall) -> Tensor:
        feature, output = watch(call)
        assert call.tail is not None and output is not None
        if call.step != 2 or found:
            return output
        direction, weight = noise(*feature.shape, seed=1), noise(*output.shape, seed=2)
        leaf = feature.clone().requires_grad_()
        (call.tail(leaf) * weight).sum().backward()
        assert leaf.grad is not None
        found["grad"] = leaf.grad.flatten() @ direction.flatten()
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(call.tail(forward_ad.make_dual(feature, direction))).tangent
        assert moved is not None
        found["forward"] = (moved * weight).sum()
        difference = call.tail(feature + 0.01 * direction).double() - call.tail(feature - 0.01 * direction).double()
        found["expected"] = ((difference * weight).sum() / 0.02).float()
        return output

    before = {name: parameter.requires_grad for name, parameter in case.pipe.transformer.named_parameters()}
    latents = case.run([0], differentiate)
    torch.testing.assert_close(found["grad"], found["expected"], rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(found["forward"], found["grad"], rtol=1e-3, atol=1e-4)
    assert found["expected"].abs() > 0.02
    check_same(latents, case.plain(0))
    assert all(parameter.grad is None for parameter in case.pipe.transformer.parameters())
    assert {name: parameter.requires_grad for name, parameter in case.pipe.transformer.named_parameters()} == before


@every_case
def test_recorded_outputs_are_answers_that_run_no_model(name: str) -> None:
    case = CASES[name]()
    source = case.source()
    outputs: dict[tuple[int, str], list[Tensor]] = {}

    def record(call: ModelCall) -> Tensor:
        output = in_full(call)
        outputs.setdefault((call.step, call.branch), []).append(output.clone())
        return output

    plain = [(source.run([run], record), case.latents[-1])[1] for run in (0, 1)]

    def replay(call: ModelCall) -> Tensor:
        recorded = outputs[call.step, call.branch]
        assert call.latents is not None
        if len(call.latents) == len(recorded[0]):
            return recorded[0]
        # Guidance in one call has the runs of each branch together.
        halves = zip(*(output.chunk(len(output)) for output in recorded), strict=True)
        return torch.cat([torch.cat(half) for half in halves])

    with counting(*case.models()) as count:
        source.run([0], replay)
        assert torch.equal(case.latents[-1], plain[0])
        source.run([0, 1], replay)
        torch.testing.assert_close(case.latents[-1], torch.cat(plain), rtol=1e-5, atol=1e-5)
        assert count.blocks == 0


def test_two_transformers_are_one_source() -> None:
    case = CASES["wan 2.2"]()
    calls: list[tuple[int, str, int]] = []

    def look(call: ModelCall) -> Tensor:
        calls.append((call.step, call.branch, call.model))
        return in_full(call)

    case.run([0], look)
    turns = [int(sigma < 0.8) for sigma in case.source().sigmas[:-1]]
    assert sum(turns) in range(1, STEPS)
    assert calls == [(step, branch, turns[step]) for step in range(STEPS) for branch in ("cond", "uncond")]
    assert not any(map(find_hook, case.models()))
    assert all(parameter.requires_grad for model in case.models() for parameter in model.parameters())
    assert case.source().model.count("WanTransformer3DModel norm_out") == 2
    others = (wan_case(boundary=0.8, guidance_scale_2=2.5), wan_case(boundary=0.7, guidance_scale_2=2.0))
    assert len({each.source().identity for each in (case, *others)}) == 3


def test_an_answer_with_gradients_reaches_the_pipeline_without() -> None:
    case = flux_case()
    scale = torch.ones((), requires_grad=True)
    outputs: list[Tensor] = []

    def scaled(call: ModelCall) -> Tensor:
        assert call.tail is not None
        answer = call.tail(call.blocks() * scale)
        assert answer.requires_grad
        return answer

    plain = case.plain(0)
    case.pipe.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    modes: set[bool] = set()
    blocks_of(case.pipe.transformer)[0].register_forward_hook(lambda *_: modes.add(torch.is_grad_enabled()))
    torch.testing.assert_close(case.run([0], scaled), plain)
    assert len(outputs) == STEPS and not any(output.requires_grad for output in outputs)
    assert modes == {False}, "blocks run as in plain sampling, compiled ones in the same graph"


def test_the_policy_has_gradients_where_run_was_called_with_them() -> None:
    case = flux_case()
    modes: set[bool] = set()
    with torch.no_grad():
        case.run([0], lambda call: (modes.add(torch.is_grad_enabled()), in_full(call))[1])
    assert modes == {False}
    modes.clear()
    pipe = odd_pipeline()
    source = PipelineSource(pipe, ["one"], steps=2, itself_without=False)
    source.run([0], lambda call: (modes.add(torch.is_grad_enabled()), in_full(call))[1])
    assert modes == {True}


def test_a_pipeline_may_write_to_what_it_was_given() -> None:
    case = hunyuan_case()
    features: list[Tensor] = []

    def keep(call: ModelCall) -> Tensor | None:
        feature, output = watch(call)
        features.append(feature)
        return output

    case.pipe.transformer.register_forward_hook(lambda module, args, output: output[0].zero_())
    case.run([0], keep)
    assert all(feature.any() for feature in features)


def test_outputs_are_refilled_in_their_own_containers() -> None:
    tensor, other = noise(2, 3, seed=1), noise(2, 3, seed=2)
    sample = diffusers.models.modeling_outputs.Transformer2DModelOutput
    for output in (tensor, (tensor,), sample(sample=tensor), (list(tensor),), sample(sample=list(tensor))):
        found = only_tensor(output)
        assert found is not None and torch.equal(found, tensor)
        again = refilled(output, other)
        assert type(again) is type(output)
        assert isinstance(output, Tensor) or type(again[0]) is type(output[0])
        found = only_tensor(again)
        assert found is not None and torch.equal(found, other)
    for output in ((tensor, other), [tensor, other[:1]], [], None, (tensor, "text")):
        assert only_tensor(output) is None


@every_case
def test_sigmas_are_known_without_running_the_model(name: str) -> None:
    case = CASES[name]()
    with counting(*case.models()) as count:
        sigmas = case.source().sigmas
        assert count.blocks == 0
        assert not any(map(find_hook, case.models()))
    case.plain(0)
    assert list(sigmas) == case.pipe.scheduler.sigmas.tolist()


@every_case
def test_branches_take_one_step(name: str) -> None:
    case = CASES[name]()
    expected = BRANCHES.get(name, ("cond",))
    with counting(*case.models()) as count:
        assert case.source().branches == expected
    assert count.blocks == len(expected) * len(blocks_of(case.pipe.transformer))


def test_the_pipeline_is_left_as_it_was() -> None:
    case = flux_case()
    source, model = case.source(), case.pipe.transformer
    case.pipe.set_progress_bar_config(leave=False)
    forward, attributes = model.forward, set(vars(model))

    def fail(call: ModelCall) -> Tensor:
        assert case.pipe._progress_bar_config["disable"]
        if call.step == 3:
            raise KeyboardInterrupt
        return in_full(call)

    for policy in (in_full, fail):
        try:
            source.run([0], policy)
        except KeyboardInterrupt:
            assert policy is fail
        assert find_hook(model) is None and not any(module._forward_pre_hooks for module in model.modules())
        assert case.pipe._progress_bar_config == {"leave": False}
        assert model.forward == forward and set(vars(model)) - attributes <= {"_diffusers_hook"}
        assert all(parameter.requires_grad for parameter in model.parameters())
    del case.pipe._progress_bar_config
    source.run([0], in_full)
    assert "_progress_bar_config" not in vars(case.pipe)


def test_offloaded_models_are_freed_after_every_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    case = flux_case()
    freed: list[bool] = []
    monkeypatch.setattr(case.pipe, "maybe_free_model_hooks", lambda: freed.append(True), raising=False)
    source = case.source()
    assert len(source.sigmas) == STEPS + 1
    assert len(freed) == 1
    source.run([0], in_full)
    assert len(freed) == 2


def test_accelerate_may_offload() -> None:
    accelerate = pytest.importorskip("accelerate", reason="diffusers' offload needs accelerate")
    case = flux_case()
    plain = case.plain(0)
    accelerate.hooks.add_hook_to_module(case.pipe.transformer, accelerate.hooks.ModelHook())
    wrapped = case.pipe.transformer.forward
    assert torch.equal(case.run([0], in_full), plain)
    assert case.pipe.transformer.forward == wrapped


def test_lora_counts_in_blocks_and_tail() -> None:
    peft = pytest.importorskip("peft", reason="diffusers' LoRA needs peft")
    case = flux_case()
    without, name = case.plain(0), case.source().model
    torch.manual_seed(5)
    config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "proj_out"])
    case.pipe.transformer.add_adapter(config, adapter_name="style")
    tuned = case.plain(0)
    assert not torch.equal(tuned, without)
    assert torch.equal(case.run([0], in_full), tuned)
    enable(case.pipe, TaylorSeer(2, variable="sigma"), SPARSE)
    expected = case.plain(0)
    disable(case.pipe)
    assert torch.equal(case.run([0], Followed(case.source())), expected)
    assert case.source().model != name


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_compiled_model_is_run(wrapped: bool) -> None:
    case = flux_case()
    enable(case.pipe, TaylorSeer(2, variable="sigma"), SPARSE)
    expected = case.plain(0)
    disable(case.pipe)
    torch.compiler.reset()
    if wrapped:
        case.pipe.transformer = torch.compile(case.pipe.transformer, backend="eager", fullgraph=True)
    else:
        case.pipe.transformer.compile(backend="eager", fullgraph=True)
    assert torch.equal(case.run([0], Followed(case.source())), expected)


def test_texts_are_prompts_and_negative_prompts_are_repeated() -> None:
    pipe, calls = odd_pipeline(), []
    source = PipelineSource(pipe, ["one", "two"], steps=2, negative_prompt="ugly", on_call=calls.append)
    source.run([1, 0], in_full)
    assert calls[-1]["prompt"] == ["two", "one"] and calls[-1]["negative_prompt"] == ["ugly", "ugly"]
    assert len(source) == 2


def test_a_saved_pipeline_is_loaded_and_prompts_may_be_classes(tmp_path: Path) -> None:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=2, sample_size=4
    )
    for parameter in transformer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1)
    diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler()).save_pretrained(tmp_path)
    pipe = quiet(load_pipeline(str(tmp_path), dtype=torch.float64))
    assert pipe.transformer.dtype == torch.float64
    source = PipelineSource(pipe, [{"class_labels": [3]}, {"class_labels": [8]}], steps=4, guidance_scale=2.0)
    assert len(source.sigmas) == 5
    shapes: list[torch.Size] = []

    def look(call: ModelCall) -> Tensor | None:
        feature, output = watch(call)
        shapes.append(feature.shape)
        return output

    source.run([1, 0], look)
    # Guidance in one call: both runs, with and without their class.
    assert shapes == [torch.Size((4, 4, 32))] * 4
    with pytest.raises(ValueError, match=r"must be a folder or a hub id of a diffusers pipeline, got .*nothing"):
        load_pipeline(str(tmp_path / "nothing"))


def test_calls_without_a_context_are_branches_by_their_number() -> None:
    source = PipelineSource(odd_pipeline(), ["one"], steps=3, true_cfg=2.0, contexts=False)
    assert source.branches == (ONLY_BRANCH, "cond 2")


def test_the_identity_depends_on_prompts_arguments_and_seed() -> None:
    pipe = CASES["flux"]().pipe
    make = partial(PipelineSource, pipe, steps=STEPS)
    image = torch.zeros(1, 3)
    sources = [
        make(["a", "b"]),
        make(["ab", ""]),
        make(["a", "b"], seed=1),
        make(["a", "b"], guidance_scale=5.0),
        make([{"prompt_embeds": image}]),
        make([{"prompt_embeds": image + 1}]),
        make([{"prompt_embeds": image.bfloat16()}]),
    ]
    assert len({source.identity for source in sources}) == len(sources)
    assert make(["a", "b"]).identity == sources[0].identity


def test_the_name_of_the_model_depends_on_model_and_capture_point() -> None:
    case = flux_case()
    names = {
        case.source().model,
        case.source(capture="proj_out").model,
        qwen_case().source().model,
        hunyuan_case().source().model,
    }
    assert len(names) == 4
    assert case.source().model == flux_case().source().model
    assert case.source().model.startswith("FluxTransformer2DModel norm_out ")

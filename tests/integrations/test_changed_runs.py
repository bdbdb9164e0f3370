"""Runs that change in the middle: a history serves the calls that it was made for, from the step on where it began."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_flux import (
    CHANNELS,
    NUM_BLOCKS,
    TinyPipeline,
    add_lora,
    call_arguments,
    tiny_transformer,
    watching,
)
from tiny_models import MODELS, VARIANTS, Tiny, at_step, sample_of
from torch import Tensor, nn

from lesa_kernels import Predictor, Reuse, Schedule, TaylorSeer
from lesa_kernels.integrations import disable, enable, summary

STEPS = 10
FULL = (0, 1, 5)
SPARSE = Schedule.explicit(STEPS, FULL)
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
CHANGED_AT = 3
Arguments = dict[str, Any]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# What comes after the capture point may write to what it gets.


class InPlaceNorm(nn.Module):
    """As a fused kernel that normalizes where its input lies."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, feature: Tensor, embedding: Tensor) -> Tensor:
        return feature.copy_(self.norm(feature, embedding))


@pytest.mark.parametrize("predictor", [Reuse(), TaylorSeer(1, variable="sigma")], ids=["reuse", "taylor"])
@pytest.mark.parametrize("chunk", [None, 1])
def test_a_norm_that_writes_to_its_input_changes_no_image(
    pipe: TinyPipeline, predictor: Predictor, chunk: int | None
) -> None:
    enable(pipe, predictor, SPARSE, chunk=chunk)
    expected = pipe(STEPS)
    pipe.transformer.norm_out = InPlaceNorm(pipe.transformer.norm_out)
    enable(pipe, predictor, SPARSE, chunk=chunk)
    assert torch.equal(pipe(STEPS), expected)
    assert summary(pipe).forecast == STEPS - len(FULL)


@pytest.mark.parametrize("predictor", [Reuse(), TaylorSeer(1, variable="sigma")], ids=["reuse", "taylor"])
@pytest.mark.parametrize("name", MODELS)
def test_a_hook_that_writes_to_the_feature_does_not_reach_the_history(name: str, predictor: Predictor) -> None:
    def sampled(hook: Callable[..., Any]) -> list[Tensor]:
        model = MODELS[name].model()
        enable(model, predictor, SPARSE, sigmas=SIGMAS)
        capture = summary_capture(model)
        if capture:
            model.get_submodule(capture).register_forward_pre_hook(hook)
        # The adapter is tried out on the first step, where such a hook would act on its own input.
        return [sample_of(model(**at_step(MODELS[name], step, SIGMAS[step]))) for step in range(STEPS)]

    def in_place(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        inputs[0].mul_(0.5).add_(0.25)

    def on_a_copy(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].clone().mul_(0.5).add_(0.25), *inputs[1:])

    assert all(map(torch.equal, sampled(in_place), sampled(on_a_copy)))


def summary_capture(model: nn.Module) -> str:
    from lesa_kernels.integrations.models import find_adapter

    return find_adapter(model).capture


# Branches without names.


def features_of(model: nn.Module, conditions: list[Arguments], order: Callable[[int], list[int]]) -> list[list[Tensor]]:
    """The features of each branch in a loop that opens no cache context; a step's calls come in the given order."""
    features: list[list[Tensor]] = [[] for _ in conditions]
    for step in range(STEPS):
        latents = torch.randn(1, 6, CHANNELS, generator=torch.Generator().manual_seed(step))
        now = {"hidden_states": latents, "timestep": torch.tensor([SIGMAS[step]])}
        for branch in order(step):
            with watching(model) as watch:
                model(**conditions[branch] | now)
            features[branch] += watch.features
    return features


def is_formula(features: list[Tensor], first_step: int = 0) -> bool:
    """Whether features follow from those of the full steps of their own branch, by reuse."""
    full = sorted({first_step, *(step for step in FULL if step > first_step)})
    return all(
        torch.equal(feature, features[max(each for each in full if each <= step) - first_step])
        for step, feature in enumerate(features, first_step)
    )


ORDERS: dict[str, Callable[[int], list[int]]] = {
    "both": lambda step: [0, 1],
    "guidance ends, cond first": lambda step: [0, 1] if step < 4 else [0],
    "guidance ends, uncond first": lambda step: [1, 0] if step < 4 else [0],
    "guidance begins, uncond first": lambda step: [0] if step < 3 else [1, 0],
    "the order changes": lambda step: [0, 1] if step % 2 else [1, 0],
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("given", ["sigmas", "scheduler"])
def test_branches_without_names_are_told_apart_by_their_prompts(order: str, given: str) -> None:
    model, scheduler = tiny_transformer(), FlowMatchEulerDiscreteScheduler()
    conditions = [call_arguments(torch.zeros(1, 6, CHANNELS), 1.0, prompt) for prompt in range(2)]
    if given == "sigmas":
        enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
        features = features_of(model, conditions, ORDERS[order])
    else:
        scheduler.set_timesteps(sigmas=SIGMAS[:-1])
        enable(model, Reuse(), SPARSE, scheduler=scheduler)
        features = features_of(model, conditions, lambda step: _with_step(scheduler, model, step, ORDERS[order](step)))
    found = summary(model)
    assert found.refused is None
    assert is_formula(features[0])
    late = next(step for step in range(STEPS) if 1 in ORDERS[order](step))
    assert is_formula(features[1], late)
    assert not torch.equal(features[0][4], features[1][0])
    assert found.steps == STEPS
    assert found.full + found.forecast == len(features[0]) + len(features[1])


def _with_step(scheduler: Any, model: nn.Module, step: int, branches: list[int]) -> list[int]:
    """Bring a scheduler to a step."""
    scheduler._step_index = step or None
    return branches


def test_a_loop_of_given_sigmas_may_call_twice_a_step(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(1), SPARSE)
    expected = pipe(STEPS, true_cfg=3.0)
    sigmas = pipe.scheduler.sigmas
    disable(pipe)
    for contexts in (False, True):
        enable(pipe.transformer, TaylorSeer(1), SPARSE, sigmas=sigmas)
        assert torch.equal(pipe(STEPS, true_cfg=3.0, contexts=contexts), expected)
        assert (summary(pipe.transformer).full, summary(pipe.transformer).forecast) == (6, 14)


class Told(nn.Module):
    """A model that is told anything."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])
        self.norm_out = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, timestep: Any) -> tuple[Tensor]:
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return (self.norm_out(hidden_states),)


WAYS: dict[str, Callable[[float], Any]] = {
    "number": lambda sigma: sigma,
    "whole number": lambda sigma: int(1000 * sigma),
    "whole number in a tensor": lambda sigma: torch.tensor([1000 * sigma]).long(),
    "number of each token": lambda sigma: torch.tensor([[0.0, sigma]]),
    "NaN": lambda sigma: torch.tensor(torch.nan),
    "nothing": lambda sigma: None,
    "empty tensor": lambda sigma: torch.empty(0),
    "complex number": lambda sigma: torch.tensor(1j),
    "number beyond any float": lambda sigma: 10**400,
    "tensor without numbers": lambda sigma: torch.empty(1, device="meta"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_may_be_told_its_noise_level_as_anything(way: str) -> None:
    model, sigmas = Told(), [1 - (step / STEPS) ** 0.5 for step in range(STEPS)] + [0.0]
    sigmas[STEPS - 1] = 0.0096
    enable(model, Reuse(), SPARSE, sigmas=sigmas)
    for step in range(STEPS):
        model(torch.ones(1, 4), WAYS[way](sigmas[step]))
    assert (summary(model).full, summary(model).forecast) == (len(FULL), STEPS - len(FULL))


@pytest.mark.parametrize("shift", [1, 12])
def test_two_calls_that_differ_in_nothing_but_their_latents_run_in_full(shift: int) -> None:
    """Tiles, or a loop that was broken off and begins again: with given sigmas nothing says which."""
    model, conditions = tiny_transformer(), call_arguments(torch.zeros(1, 6, CHANNELS), 1.0)
    sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in SIGMAS]
    enable(model, Reuse(), SPARSE, sigmas=sigmas)

    def sample() -> None:
        for sigma in sigmas[:-1]:
            for _ in range(2):
                model(**conditions | {"hidden_states": torch.randn(1, 6, CHANNELS), "timestep": torch.tensor([sigma])})

    with watching(model) as watch, pytest.warns(UserWarning, match="two calls at step 0 have the same conditions"):
        sample()
    assert watch.blocks == 2 * STEPS * NUM_BLOCKS


def test_a_loop_that_says_nothing_of_its_steps_runs_in_full() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])
            self.norm_out = nn.Linear(4, 4)

        def forward(self, hidden_states: Tensor, text: Tensor) -> tuple[Tensor]:
            for block in self.blocks:
                hidden_states = block(hidden_states + text)
            return (self.norm_out(hidden_states),)

    model, texts = Silent(), torch.randn(2, 1, 4)
    plain = [model(torch.ones(1, 4), texts[step % 2])[0] for step in range(2 * STEPS)]
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    with pytest.warns(UserWarning, match="nothing says whether it is of the same step"):
        answers = [model(torch.ones(1, 4), texts[step % 2])[0] for step in range(2 * STEPS)]
    assert all(map(torch.equal, plain, answers))


# Runs that start late, whose batch changes, or whose noise levels do.


@pytest.mark.parametrize("starts", [(4, 0, 7), (6, 0, 2)])
@pytest.mark.parametrize("kind", [FlowMatchEulerDiscreteScheduler, DDIMScheduler])
def test_the_first_step_is_found_from_what_the_model_is_told(kind: type[Any], starts: tuple[int, ...]) -> None:
    model, scheduler = tiny_transformer(), kind()
    enable(model, Reuse(), SPARSE, scheduler=scheduler)
    # At step 6 DDIM tells 0.3, which is also what 1 - t / T is at step 2.
    for start in starts:
        scheduler.set_timesteps(STEPS)
        latents = torch.randn(1, 6, CHANNELS)
        conditions = call_arguments(latents, 1.0)
        with watching(model) as watch:
            for t in scheduler.timesteps[start:]:
                # The scheduler finds its own index here, too.
                now = {"hidden_states": latents, "timestep": t[None] / 1000}
                latents = scheduler.step(model(**conditions | now).sample, t, latents).prev_sample
        full = {start, *(step for step in FULL if step > start)}
        assert watch.blocks == len(full) * NUM_BLOCKS
        assert f"full steps: {' '.join(map(str, sorted(full)))}" in summary(model).plan


@pytest.mark.parametrize("ends_at", [3, STEPS])
def test_a_loop_of_given_sigmas_that_starts_late_is_a_run_of_its_own_each_time(
    pipe: TinyPipeline, ends_at: int
) -> None:
    model, conditions = pipe.transformer, call_arguments(torch.zeros(1, 6, CHANNELS), 1.0)
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    for steps in (range(ends_at), range(4, STEPS), range(7, STEPS), range(2, STEPS)):
        for step in steps:
            model(**conditions | {"timestep": torch.tensor([SIGMAS[step]])})
    found = summary(model)
    assert (found.full, found.forecast, found.restarts) == (2, 6, ())


def test_a_batch_that_changes_begins_a_history(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), SPARSE)

    def change(index: int, latents: Tensor) -> Tensor:
        return latents.repeat(2, 1, 1) if index == 2 else latents[:1] if index == 6 else latents

    with watching(pipe.transformer) as watch:
        pipe(STEPS, on_step_end=change)
    features = watch.features
    source = [0, 1, 1, 3, 3, 5, 5, 7, 7, 7]
    assert all(torch.equal(feature, features[source[step]]) for step, feature in enumerate(features))
    assert watch.blocks == len(set(source)) * NUM_BLOCKS
    found = summary(pipe)
    assert found.refused is None and [step for step, _ in found.restarts] == [3, 7]
    assert all("the latents changed from" in reason for _, reason in found.restarts)
    assert "a history began at step 3: the latents changed" in str(found)


def test_noise_levels_that_are_scaled_in_place_are_read_again(pipe: TinyPipeline) -> None:
    enable(pipe, TaylorSeer(1, variable="sigma"), SPARSE)

    def scale(index: int, latents: Tensor) -> Tensor:
        if index == 2:
            pipe.scheduler.sigmas.mul_(0.5)
            pipe.scheduler.timesteps.mul_(0.5)
        return latents

    with watching(pipe.transformer) as watch:
        pipe(STEPS, on_step_end=scale)
    t, h = pipe.scheduler.sigmas.double(), [feature.double() for feature in watch.features]
    assert torch.equal(h[4], h[3])
    for step in range(6, STEPS):
        expected = h[5] + (t[step] - t[5]) * (h[5] - h[3]) / (t[5] - t[3])
        torch.testing.assert_close(h[step], expected, rtol=1e-4, atol=1e-4)
    assert summary(pipe).full + summary(pipe).forecast == STEPS
    assert [step for step, _ in summary(pipe).restarts] == [3]


# What calls are conditioned on changes.


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from tensors_in(f"{name}[{index}]", each)


def conditions_of(tiny: Tiny) -> dict[str, Tensor]:
    arguments = tiny.arguments(0)
    latents = next(iter(arguments))
    return {
        path: tensor
        for name, value in arguments.items()
        if name not in (latents, "timestep", "t")
        for path, tensor in tensors_in(name, value)
    }


def cloned(value: Any) -> Any:
    """Tensors that share no memory, each with a counter of its own of what is written to it."""
    if isinstance(value, list | tuple):
        return type(value)(map(cloned, value))
    return value.clone() if isinstance(value, Tensor) else value


def replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(replaced(each, old, new) for each in value)
    return new if value is old else value


def other_value(tensor: Tensor) -> Tensor:
    """Another valid value: other numbers, or for masks and ids a zero in place of the last one."""
    if tensor.is_floating_point():
        return tensor + torch.randn(tensor.shape, generator=torch.Generator().manual_seed(9))
    other = tensor.clone()
    other.view(-1)[-1] = 1 - int(other.view(-1)[-1])
    return other


CASES = [(name, path) for name, tiny in (MODELS | VARIANTS).items() for path in conditions_of(tiny)]


@pytest.mark.parametrize("in_place", [False, True], ids=["exchanged", "written to"])
@pytest.mark.parametrize(("name", "path"), CASES)
def test_a_change_is_the_begin_of_a_history(name: str, path: str, in_place: bool) -> None:
    """A change of any tensor at a step: from there on all is as in an enabled run that begins at that step."""
    tiny = (MODELS | VARIANTS)[name]
    model = tiny.model()
    always = {step: at_step(tiny, step, SIGMAS[step]) for step in range(STEPS)}
    shared = {name: cloned(value) for name, value in tiny.arguments(0).items()}
    old = dict(entry for key, value in shared.items() for entry in tensors_in(key, value))[path]
    new = other_value(old)
    latents, time = next(iter(shared)), "t" if "t" in shared else "timestep"

    def call(step: int, changed: bool) -> Tensor:
        arguments = shared | {each: always[step][each] for each in (latents, time)}
        if changed and not in_place:
            arguments = {key: replaced(value, old, new) for key, value in arguments.items()}
        return sample_of(model(**arguments, return_dict=False)).clone()

    enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    before = [call(step, False) for step in range(CHANGED_AT)]
    if in_place:
        old.copy_(new)
    after = [call(step, True) for step in range(CHANGED_AT, STEPS)]
    found = summary(model)
    enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
    expected = [call(step, True) for step in range(CHANGED_AT, STEPS)]
    assert all(map(torch.equal, after, expected))
    if "controlnet" in path:
        return
    assert found.restarts == ((CHANGED_AT, f"{path} changed"),)
    assert (found.full, found.forecast) == (4, 6) and found.refused is None
    assert len(before) == CHANGED_AT


def test_arguments_that_the_forward_does_not_name_are_watched() -> None:
    class Unnamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])
            self.norm_out = nn.Linear(4, 4)

        def forward(self, hidden_states: Tensor, **others: Any) -> tuple[Tensor]:
            for block in self.blocks:
                hidden_states = block(hidden_states + others["text"])
            return (self.norm_out(hidden_states),)

    model, texts = Unnamed(), torch.randn(2, 1, 4)
    prompts = [texts[0], texts[1]]
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    for step in range(STEPS):
        now = {"timestep": torch.tensor([SIGMAS[step]]), "controlnet_block_samples": [torch.randn(1, 4)]}
        model(torch.ones(1, 4), text=prompts[step >= CHANGED_AT], return_dict=False, **now)
    found = summary(model)
    assert found.restarts == ((CHANGED_AT, "text changed"),)
    assert found.unwatched == ("controlnet_block_samples",)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("change", ["scale", "switch", "disable", "fuse", "add"])
def test_a_change_of_lora_is_the_begin_of_a_history(pipe: TinyPipeline, change: str) -> None:
    model = pipe.transformer
    for name in ("one", "two"):
        add_lora(pipe, name)
    model.set_adapters(["one"], [0.5])
    changes: dict[str, Callable[[], None]] = {
        "scale": lambda: model.set_adapters(["one"], [1.5]),
        "switch": lambda: model.set_adapters(["two"], [0.7]),
        "disable": model.disable_lora,
        "fuse": lambda: model.fuse_lora(0.3),
        "add": lambda: add_lora(pipe, "three"),
    }
    conditions = call_arguments(torch.zeros(1, 6, CHANNELS), 1.0)

    def run(first: int, act: Callable[[], None]) -> list[Tensor]:
        enable(model, TaylorSeer(1), SPARSE, sigmas=SIGMAS)
        outputs = []
        for step in range(first, STEPS):
            if step == CHANGED_AT:
                act()
            latents = torch.randn(1, 6, CHANNELS, generator=torch.Generator().manual_seed(step))
            now = {"hidden_states": latents, "timestep": torch.tensor([SIGMAS[step]])}
            outputs.append(model(**conditions | now).sample)
        return outputs

    after = run(0, changes[change])[CHANGED_AT:]
    assert summary(model).restarts == ((CHANGED_AT, "LoRA changed"),)
    assert all(map(torch.equal, after, run(CHANGED_AT, lambda: None)))


@pytest.mark.parametrize("again", [False, True], ids=["first", "loaded again under its name"])
def test_a_lora_that_replaced_one_of_the_same_name_is_watched(pipe: TinyPipeline, again: bool) -> None:
    model, conditions = pipe.transformer, call_arguments(torch.zeros(1, 6, CHANNELS), 1.0)
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    for _ in range(1 + again):
        add_lora(pipe, "one")
        for step in range(STEPS):
            if step == CHANGED_AT:
                model.set_adapters(["one"], [1.5])
            model(**conditions | {"timestep": torch.tensor([SIGMAS[step]])})
        assert summary(model).restarts == ((CHANGED_AT, "LoRA changed"),)
        model.unload_lora()


def test_a_lora_scale_that_is_multiplied_in_and_divided_out_is_no_change(pipe: TinyPipeline) -> None:
    model, conditions = pipe.transformer, call_arguments(torch.zeros(1, 6, CHANNELS), 1.0)
    add_lora(pipe, "one")
    model.set_adapters(["one"], [0.8 / 4])
    assert 0.8 * 0.7 / 0.7 != 0.8
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    for step in range(STEPS):
        model(**conditions | {"timestep": torch.tensor([SIGMAS[step]]), "joint_attention_kwargs": {"scale": 0.7}})
    assert (summary(model).full, summary(model).restarts) == (len(FULL), ())


def test_another_guidance_scale_begins_a_history(pipe: TinyPipeline) -> None:
    enable(pipe, Reuse(), SPARSE)
    pipe._guidance_scale = 3.0

    def change(index: int, latents: Tensor) -> Tensor:
        if index == 2:
            pipe._guidance_scale = 5.0
        return latents

    pipe(STEPS, on_step_end=change)
    assert summary(pipe).restarts == ((3, "guidance_scale of the pipeline changed"),)


# What is made anew for each call is not what changed.


@pytest.mark.parametrize("device_of_copies", ["same memory", "copies"])
def test_copies_of_the_same_values_are_no_change(pipe: TinyPipeline, device_of_copies: str) -> None:
    model, conditions = pipe.transformer, call_arguments(torch.zeros(1, 6, CHANNELS), 1.0)
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    for step in range(STEPS):
        made = {
            name: value.view_as(value) if device_of_copies == "same memory" else value.clone()
            for name, value in conditions.items()
        }
        model(**made | {"timestep": torch.tensor([SIGMAS[step]])})
    assert (summary(model).full, summary(model).restarts) == (len(FULL), ())


@pytest.mark.parametrize("changed_at", [3, 4, 6])
def test_a_change_of_what_is_copied_to_a_device_is_seen_at_the_next_full_step(
    pipe: TinyPipeline, changed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing waits for a device on a forecast step.
    monkeypatch.setattr(Tensor, "is_cpu", False)
    model, prompts = pipe.transformer, [call_arguments(torch.zeros(1, 6, CHANNELS), 1.0, each) for each in range(2)]
    enable(model, Reuse(), Schedule.explicit(STEPS, (0, 5, 8)), sigmas=SIGMAS)
    for step in range(STEPS):
        copies = {name: value.clone() for name, value in prompts[step >= changed_at].items()}
        with model.cache_context("cond"):
            model(**copies | {"timestep": torch.tensor([SIGMAS[step]])})
    found = summary(model)
    assert [step for step, _ in found.restarts] == [5 if changed_at < 5 else 8]
    assert (found.full, found.forecast, found.unwatched) == (3, 7, ())


def test_branches_whose_prompts_are_copied_to_a_device_are_told_apart(
    pipe: TinyPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "is_cpu", False)
    model, prompts = pipe.transformer, [call_arguments(torch.zeros(1, 6, CHANNELS), 1.0, each) for each in range(2)]
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=SIGMAS[:-1])
    enable(model, Reuse(), SPARSE, scheduler=scheduler)
    features: list[list[Tensor]] = [[], []]
    for step in range(STEPS):
        for branch in _with_step(scheduler, model, step, ORDERS["guidance ends, uncond first"](step)):
            copies = {name: value.clone() for name, value in prompts[branch].items()}
            latents = torch.randn(1, 6, CHANNELS, generator=torch.Generator().manual_seed(step))
            with watching(model) as watch:
                model(**copies | {"hidden_states": latents, "timestep": torch.tensor([SIGMAS[step]])})
            features[branch] += watch.features
    assert is_formula(features[0]) and is_formula(features[1])


class Wrapper(Tensor):
    """A tensor that wraps another one and has no memory, as a DTensor has none."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*[each.inner if isinstance(each, Wrapper) else each for each in args], **kwargs or {})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ["sparse", "nested", "wrapper"])
@pytest.mark.parametrize("made", ["once", "for each call"])
def test_tensors_without_memory_or_a_comparison_cost_no_image(pipe: TinyPipeline, kind: str, made: str) -> None:
    def make(value: float) -> Tensor:
        tensor = torch.full((3,), value)
        kinds: dict[str, Callable[[], Tensor]] = {
            "sparse": tensor.to_sparse,
            "nested": lambda: torch.nested.nested_tensor([tensor, tensor[:2]]),
            "wrapper": lambda: Wrapper(tensor),
        }
        return kinds[kind]()

    model, conditions = pipe.transformer, call_arguments(torch.zeros(1, 6, CHANNELS), 1.0)
    enable(model, Reuse(), Schedule.explicit(STEPS, (0, 1, 5)), sigmas=SIGMAS)
    old, new = make(1.0), make(2.0)
    for step in range(STEPS):
        extra = old if step < 7 else new
        if made == "for each call":
            extra = make(1.0 + (step >= 7))
        now = {"timestep": torch.tensor([SIGMAS[step]]), "joint_attention_kwargs": {"extra": extra}}
        model(**conditions | now)
    found, name = summary(model), "joint_attention_kwargs.extra"
    # What cannot be compared is another one in each call.
    is_unknown = made == "for each call" and kind != "wrapper"
    assert found.restarts == ((1 if is_unknown else 7, f"{name} changed"),)
    assert found.unwatched == ((name,) if is_unknown else ())


def test_residuals_of_a_controlnet_are_not_watched_and_the_summary_says_so(pipe: TinyPipeline) -> None:
    model, conditions = pipe.transformer, call_arguments(torch.zeros(1, 6, CHANNELS), 1.0)
    enable(model, Reuse(), SPARSE, sigmas=SIGMAS)
    for step in range(STEPS):
        now = {"timestep": torch.tensor([SIGMAS[step]]), "controlnet_block_samples": [torch.randn(1, 6, 32)]}
        if step >= 7:
            now["controlnet_block_samples"] = None
        model(**conditions | now)
    found = summary(model)
    assert found.unwatched == ("controlnet_block_samples",)
    assert found.restarts == ((7, "controlnet_block_samples changed"),)
    assert "changes are not noticed of controlnet_block_samples" in str(found)


def test_what_is_another_in_each_step_costs_one_full_step_at_most(pipe: TinyPipeline) -> None:
    model, conditions = pipe.transformer, call_arguments(torch.zeros(1, 6, CHANNELS), 1.0)
    enable(model, Reuse(), Schedule.explicit(STEPS, (0, 5)), sigmas=SIGMAS)
    with watching(model) as watch:
        for step in range(STEPS):
            now = {"timestep": torch.tensor([SIGMAS[step]]), "pooled_projections": torch.randn(1, 8)}
            with model.cache_context("cond"):
                model(**conditions | now)
    assert watch.blocks == 3 * NUM_BLOCKS
    found = summary(model)
    assert found.unwatched == ("pooled_projections",)
    assert found.restarts == ((1, "pooled_projections changed"),)


def test_what_changes_often_later_is_watched(pipe: TinyPipeline) -> None:
    model, conditions = pipe.transformer, call_arguments(torch.zeros(1, 6, CHANNELS), 1.0)
    enable(model, Reuse(), Schedule.explicit(STEPS, (0,)), sigmas=SIGMAS)
    changes = (2, 3, 4, 5, 8)
    pooled = conditions["pooled_projections"]
    for step in range(STEPS):
        pooled = pooled + 1 if step in changes else pooled
        model(**conditions | {"timestep": torch.tensor([SIGMAS[step]]), "pooled_projections": pooled})
    found = summary(model)
    assert found.restarts == tuple((step, "pooled_projections changed") for step in changes)
    assert (found.full, found.unwatched) == (1 + len(changes), ())

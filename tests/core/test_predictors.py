"""LESA's module, its file formats, and TaylorSeer's polynomials."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lesa_kernels import LesaPredictor, Schedule, TaylorSeer, load_official
from lesa_kernels.predictors.taylor import taylor_weights


def _small(**sizes: object) -> LesaPredictor:
    return LesaPredictor(**{"num_steps": 10, "hidden_dim": 8, **sizes})  # type: ignore[arg-type]


SIGMAS = [1 - step / 10 for step in range(11)]


def test_state_keys_are_the_published_ones() -> None:
    shapes = {key: tuple(value.shape) for key, value in LesaPredictor(num_steps=50).state_dict().items()}
    layers = {f"layers.{i}": io for i, io in enumerate([(51, 256), (256, 256), (256, 1)])}
    expected: dict[str, tuple[int, ...]] = {}
    for stage, window in enumerate((4, 8, 8)):
        expected[f"latent.{stage}.weight"] = (1, window)
        expected[f"latent.{stage}.bias"] = (1,)
        for layer, (inputs, outputs) in layers.items():
            prefix = f"timestep.{stage}.{layer}"
            expected[f"{prefix}.grid"] = (inputs, 12)
            expected[f"{prefix}.base_weight"] = (outputs, inputs)
            expected[f"{prefix}.spline_weight"] = (outputs, inputs, 8)
            expected[f"{prefix}.spline_scaler"] = (outputs, inputs)
    assert shapes == expected


def test_grid_is_the_published_one() -> None:
    grid = _small().timestep[0].layers[0].grid
    torch.testing.assert_close(grid[0], torch.linspace(-6.6, 6.6, 12))


def test_stages_are_strict() -> None:
    predictor = LesaPredictor(num_steps=50, hidden_dim=8)
    assert [predictor.stage(t) for t in (1.0, 0.900001, 0.9, 0.500001, 0.5, 0.01, 0.0)] == [0, 0, 1, 1, 2, 2, 2]
    assert [predictor.window(t) for t in (0.95, 0.7, 0.2)] == [4, 8, 8]


def test_forward_is_the_formula_and_takes_the_last_k() -> None:
    predictor = _small()
    history = [torch.randn(3, 4) for _ in range(10)]
    got = predictor(history, SIGMAS, 0.3)
    latent, kan = predictor.latent[2], predictor.timestep[2]
    gain = kan(torch.tensor([0.3 - sigma for sigma in SIGMAS]))
    mix = sum(latent.weight[0, k] * history[2 + k] for k in range(8)) + latent.bias
    torch.testing.assert_close(got, history[-1] + gain * mix)
    got.sum().backward()
    assert latent.weight.grad is not None and kan.layers[0].spline_scaler.grad is not None
    with pytest.raises(ValueError, match=r"history must hold at least 8 features at t = 0\.3, got 7"):
        predictor(history[:7], SIGMAS, 0.3)
    with pytest.raises(ValueError, match=r"sigmas must hold num_steps \+ 1 = 11 values.*got 10"):
        predictor(history, SIGMAS[:-1], 0.3)
    with pytest.raises(ValueError, match=r"history\[7\] must have shape \(3, 4\) like history\[0\], got \(4,\)"):
        predictor([*history, history[0][0]], SIGMAS, 0.3)
    with pytest.raises(TypeError, match=r"history\[7\] must have dtype float32 like history\[0\], got float64"):
        predictor([*history, history[0].double()], SIGMAS, 0.3)
    with pytest.raises(TypeError, match=r"history\[6\] must be a dense \(strided\) tensor, got a torch\.sparse"):
        predictor([*history, history[0].to_sparse(), history[0]], SIGMAS, 0.3)
    with pytest.raises(TypeError, match=r"history\[7\] must be a tensor, got None"):
        predictor([*history, None], SIGMAS, 0.3)


def test_half_precision_features_with_float32_parameters() -> None:
    got = _small()([torch.randn(3).bfloat16() for _ in range(8)], torch.tensor(SIGMAS), 0.25)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"stages": [(0.5, 4), (0.9, 8)]}, "stages must have falling thresholds"),
        ({"stages": []}, "stages must have falling thresholds"),
        ({"num_steps": 5.0}, "num_steps must be an integer, got 5.0"),
        ({"grid_size": 0}, "grid_size must be at least 1, got 0"),
        ({"spline_order": -1}, "spline_order must be at least 0"),
        ({"stages": [(float("nan"), 4)]}, r"threshold of stages\[0\] must be finite"),
        ({"stages": [(0.0, 4.7)]}, r"stages\[0\] must have a history of 1 to 64 features, got 4.7"),
        ({"stages": [(0.9, 0), (0.0, 8)]}, r"stages\[0\] must have a history of 1 to 64 features, got 0"),
    ],
)
def test_constructor_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        _small(**arguments)


def test_times_may_be_elements_of_a_scheduler_s_sigmas() -> None:
    predictor, history, sigmas = _small(), [torch.randn(3) for _ in range(8)], torch.tensor(SIGMAS)
    assert torch.equal(predictor(history, sigmas, sigmas[7]), predictor(history, sigmas, float(sigmas[7])))
    assert predictor.parameters_at(sigmas, np.float32(0.3))[0].shape == (8,)


def test_another_default_device_changes_nothing() -> None:
    predictor = _small()
    plan = predictor.plan(SIGMAS, Schedule.explicit(10, [0]))
    with torch.device("meta"):
        assert predictor.plan(SIGMAS, Schedule.explicit(10, [0])) == plan


def test_autocast_does_not_touch_the_gains() -> None:
    predictor = _small()
    plan = predictor.plan(SIGMAS, Schedule.explicit(10, [0]))
    with torch.autocast("cpu", torch.bfloat16):
        assert predictor.plan(SIGMAS, Schedule.explicit(10, [0])) == plan


@pytest.mark.parametrize("bad", [[1.0, float("nan"), 0.0], [1.0, 0.5, 0.5, 0.0], [0.0, 0.5, 1.0], [1.0]])
def test_a_plan_refuses_sigmas_that_do_not_fall(bad: list[float]) -> None:
    with pytest.raises(ValueError, match=r"sigmas(\[1\] must be finite, got nan| must hold S\+1 >= 2 falling numbers)"):
        TaylorSeer().plan(bad, Schedule.explicit(max(len(bad) - 1, 1), [0]))


def test_a_plan_refuses_what_is_no_schedule() -> None:
    with pytest.raises(TypeError, match="schedule must be a Schedule or a rule that makes one, got list"):
        TaylorSeer().plan(SIGMAS, [0, 1])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="schedule must make a Schedule from the sigmas, got NoneType"):
        TaylorSeer().plan(SIGMAS, lambda sigmas: None)  # type: ignore[arg-type,return-value]


def test_a_plan_refuses_parameters_that_are_not_finite() -> None:
    predictor = _small()
    with torch.no_grad():
        predictor.latent[2].bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the row of step 8 must be finite"):
        predictor.plan(SIGMAS, Schedule.explicit(10, [0]))


class _Settings(dict):  # type: ignore[type-arg]
    """A config that allows attributes, as some libraries have it."""


class _Names(list):  # type: ignore[type-arg]
    pass


@pytest.mark.parametrize(
    "config",
    [
        _Settings(rate=1e-4),
        collections.defaultdict(int, a=1),
        collections.deque([1, 2]),
        _Names("ab"),
        {(1, 2): {3}},
        10**700,
    ],
    ids=["dict", "defaultdict", "deque", "list", "tuple as key", "long number"],
)
def test_what_a_checkpoint_holds_beside_its_model_does_not_matter(tmp_path: Path, config: object) -> None:
    predictor = LesaPredictor(num_steps=10, hidden_dim=8)
    torch.save({"config": config, "model": predictor.state_dict()}, tmp_path / "file.pt")
    loaded = load_official(tmp_path / "file.pt")["cond"]
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in predictor.state_dict().items())


def test_save_and_load(tmp_path: Path) -> None:
    predictor = LesaPredictor(num_steps=10, hidden_dim=8, stages=((0.8, 2), (0.0, 3)))
    predictor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    loaded = LesaPredictor.from_pretrained(str(tmp_path))
    assert loaded.stages == predictor.stages
    for key, value in predictor.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key])


def test_loading_fills_nothing_with_random_numbers(tmp_path: Path) -> None:
    predictor = _small()
    predictor.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = predictor.state_dict()
    save_file({key: value for key, value in state.items() if key != "latent.1.bias"}, weights)
    with pytest.raises(ValueError, match=r"latent\.1\.bias"):
        LesaPredictor.from_pretrained(str(tmp_path))
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match=tmp_path.name):
        LesaPredictor.from_pretrained(str(tmp_path))
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"must hold model\.safetensors"):
        LesaPredictor.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json must name num_steps"):
        LesaPredictor.from_pretrained(str(tmp_path))


@dataclasses.dataclass
class ForeignConfig:
    """Stands for the dataclass of the published package; loading must not need it."""

    lr: float = 1e-4


def _write(path: Path, state: dict[str, torch.Tensor]) -> Path:
    optimiser = {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 1e-4}]}
    torch.save({"config": ForeignConfig(), "model": state, "optimizer": optimiser, "scheduler": {"step": 3}}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_load_official_reads_one_branch(tmp_path: Path, prefix: str) -> None:
    predictor = LesaPredictor(num_steps=12, hidden_dim=8)
    state = {prefix + key: value.bfloat16() for key, value in predictor.state_dict().items()}
    branches = load_official(_write(tmp_path / "predictor.pt", state))
    assert list(branches) == ["cond"]
    loaded = branches["cond"]
    assert loaded.num_steps == 12 and loaded.stages == ((0.9, 4), (0.5, 8), (0.0, 8))
    for key, value in predictor.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value.bfloat16().float())


def test_load_official_reads_two_branches_with_their_threshold(tmp_path: Path) -> None:
    sources = {name: LesaPredictor(num_steps=12, hidden_dim=8) for name in ("cond", "uncond")}
    state = {}
    for name, source in sources.items():
        for key, value in source.state_dict().items():
            kind, rest = key.split(".", 1)
            state[f"{kind}_{name}.{rest}"] = value
    branches = load_official(_write(tmp_path / "predictor.pt", state))
    assert set(branches) == {"cond", "uncond"}
    for name, loaded in branches.items():
        assert [threshold for threshold, _ in loaded.stages] == [0.9, 0.4, 0.0]
        assert torch.equal(loaded.latent[1].weight, sources[name].latent[1].weight)


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.path}",)


def test_load_official_runs_no_code(tmp_path: Path) -> None:
    flag = tmp_path / "executed"
    content = {"config": Hostile(str(flag)), "model": LesaPredictor(num_steps=5, hidden_dim=4).state_dict()}
    torch.save(content, tmp_path / "hostile.pt")
    load_official(tmp_path / "hostile.pt")
    assert not flag.exists()
    torch.load(tmp_path / "hostile.pt", weights_only=False)
    assert flag.exists(), "the file was harmless: this test proved nothing"


def test_load_official_does_not_load_torchscript(tmp_path: Path) -> None:
    with pytest.deprecated_call():
        script = torch.jit.script(torch.nn.Linear(2, 2))
    script.save(str(tmp_path / "script.pt"))
    with pytest.raises(ValueError, match=r"script\.pt"):
        load_official(tmp_path / "script.pt")


def test_load_official_survives_damage(tmp_path: Path) -> None:
    good = _write(tmp_path / "good.pt", LesaPredictor(num_steps=3, hidden_dim=2).state_dict()).read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(good)
        damaged[generator.randrange(len(good))] ^= 1 << generator.randrange(8)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        with contextlib.suppress(ValueError):
            load_official(tmp_path / "damaged.pt")
            continue
        refused += 1
    assert refused > 30


def test_load_official_refuses_a_tensor_larger_than_its_storage(tmp_path: Path) -> None:
    state = LesaPredictor(num_steps=3, hidden_dim=2).state_dict()
    torch.save({"model": {**state, "latent.0.bias": torch.zeros(1).expand(1 << 45)}}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="more elements than its storage"):
        load_official(tmp_path / "bomb.pt")


def test_load_official_refuses_ambiguous_keys(tmp_path: Path) -> None:
    state = LesaPredictor(num_steps=3, hidden_dim=2).state_dict()
    twice = {**state, **{f"module.{key}": value for key, value in state.items()}}
    with pytest.raises(ValueError, match="has two tensors for"):
        load_official(_write(tmp_path / "twice.pt", twice))
    suffixed = {key.replace(".", "_uncond.", 1): value for key, value in state.items()}
    with pytest.raises(ValueError, match="no tensors of a conditional branch"):
        load_official(_write(tmp_path / "uncond.pt", suffixed))


def test_load_official_names_what_is_wrong(tmp_path: Path) -> None:
    state = LesaPredictor(num_steps=5, hidden_dim=4).state_dict()
    good = _write(tmp_path / "good.pt", state)
    (tmp_path / "cut.pt").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "raw.pt").write_bytes(pickle.dumps({"model": 1}))
    torch.save({"model": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    _write(tmp_path / "missing.pt", {key: value for key, value in state.items() if key != "latent.1.bias"})
    _write(tmp_path / "nan.pt", {key: value * torch.nan for key, value in state.items()})
    _write(tmp_path / "two.pt", {key: value for key, value in state.items() if ".2." not in key[:12]})
    with zipfile.ZipFile(tmp_path / "empty.pt", "w") as archive:
        archive.writestr("a/b", "c")
    for name, message in {
        "absent.pt": "no such file",
        "cut.pt": "truncated",
        "raw.pt": "no zip archive",
        "empty.pt": "not a readable checkpoint",
        "foreign.pt": "key 'weight' is neither latent",
        "list.pt": "must hold a dict with the key 'model', got list",
        "missing.pt": "latent.1.bias",
        "nan.pt": "must be finite",
        "two.pt": "has 2 stages, thresholds must name as many",
    }.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_official(tmp_path / name)
        assert name in str(caught.value)


@pytest.mark.parametrize("order", [0, 1])
def test_taylor_is_exact_on_polynomials_of_its_order(order: int) -> None:
    nodes, at = [1.0, 0.7, 0.55, 0.2], 0.05
    weights = taylor_weights(nodes[-(order + 1) :], at)
    got = sum(w * node**order for w, node in zip(weights, nodes[-(order + 1) :], strict=True))
    assert math.isclose(got, at**order) and math.isclose(sum(weights), 1.0)


@pytest.mark.parametrize("order", [2, 3])
def test_taylor_is_the_published_recursion(order: int) -> None:
    nodes, at = [0.0, 1.0, 3.0, 7.0], 9.0
    values = torch.randn(4, dtype=torch.float64).tolist()
    factors: list[list[float]] = []
    for position, value in enumerate(values):
        new = [value]
        for degree in range(min(order, position)):
            new.append((new[degree] - factors[-1][degree]) / (nodes[position] - nodes[position - 1]))
        factors.append(new)
    want = sum(d / math.factorial(i) * (at - nodes[-1]) ** i for i, d in enumerate(factors[-1][: order + 1]))
    weights = taylor_weights(nodes[-(order + 1) :], at)
    assert math.isclose(sum(w * v for w, v in zip(weights, values[-(order + 1) :], strict=True)), want)


def test_taylor_uses_the_orders_it_has_and_checks_its_arguments() -> None:
    rows = TaylorSeer(3, "step").rows(SIGMAS)
    assert set(rows(4, [0, 2]).terms) == {0, 2}  # type: ignore[union-attr]
    assert set(rows(9, [0, 2, 3, 5, 7]).terms) == {2, 3, 5, 7}  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="must lie at different positions"):
        taylor_weights([0.9, 0.9], 0.5)
    with pytest.raises(ValueError, match="order must be 0 to 3, got 4"):
        TaylorSeer(4)
    with pytest.raises(ValueError, match='variable must be "sigma" or "step"'):
        TaylorSeer(2, "time")  # type: ignore[arg-type]

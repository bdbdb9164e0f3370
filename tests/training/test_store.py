"""The store of features: what comes out is what went in, and what is not whole or not meant is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from small_training import SCHEDULE, SIGMAS, STEPS, Guided, Meddling, equal, files_in, runs, small_predictor
from small_training import trajectories as smooth
from torch import Tensor

from lesa_kernels.training import FeatureStore, LoopSource, RecordedSource, train
from lesa_kernels.trajectories import ModelCall, StepPolicy, TrajectorySource


class Played(NamedTuple):
    step: int
    branch: str
    feature: Tensor


def run(source: TrajectorySource, runs: Sequence[int]) -> list[Played]:
    calls: list[Played] = []

    def policy(call: ModelCall) -> Tensor | None:
        feature = call.blocks()
        calls.append(Played(call.step, call.branch, feature))
        return None if call.tail is None else call.tail(feature)

    source.run(runs, policy)
    return calls


def record(folder: Path, source: TrajectorySource | None = None, **options: str) -> FeatureStore:
    return FeatureStore.record(folder, source or runs(3), model="small", progress=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_it_gives_back_what_was_recorded(tmp_path: Path, dtype: torch.dtype) -> None:
    source = runs(3, dtype)
    store = record(tmp_path, source)
    assert len(store) == 3 and store.sigmas == source.sigmas and store.model == "small" and store.branches == ("cond",)
    for chosen in ([1], [2, 0]):
        for got, want in zip(run(store, chosen), run(source, chosen), strict=True):
            assert got[:2] == want[:2] and got.feature.dtype == dtype and torch.equal(got.feature, want.feature)
    assert files_in(tmp_path) == {"index.json", *(f"run-{run:06d}.safetensors" for run in range(3))}


@pytest.mark.parametrize(
    ("dtype", "itemsize", "worst"), [("float16", 2, 2e-3), ("bfloat16", 2, 5e-3), ("float8_e4m3fn", 1, 0.07)]
)
@pytest.mark.parametrize("size", [1.0, 1e6, 1e-6])
def test_smaller_dtypes_hold_features_of_any_size(
    tmp_path: Path, dtype: str, itemsize: int, worst: float, size: float
) -> None:
    source = RecordedSource([[size * feature for feature in path] for path in smooth(2)], SIGMAS)
    store = record(tmp_path, source, dtype=dtype)
    for got, want in zip(run(store, [1]), run(source, [1]), strict=True):
        assert got.feature.dtype == torch.float32
        error = (got.feature - want.feature).abs()
        smallest = want.feature.abs().max() / 1000
        assert (error <= worst * want.feature.abs().clamp_min(smallest)).all()
    stored = load_file(tmp_path / "run-000000.safetensors")["cond/0000"]
    assert stored.element_size() == itemsize


def test_a_feature_of_zeros_stays_one(tmp_path: Path) -> None:
    source = RecordedSource([[torch.zeros(1, 4) for _ in range(STEPS)]], SIGMAS)
    assert not any(call.feature.any() for call in run(record(tmp_path, source, dtype="float8_e4m3fn"), [0]))


def test_players_get_the_dtype_that_they_ask_for(tmp_path: Path) -> None:
    record(tmp_path, dtype="float16")
    store = FeatureStore(tmp_path, dtype=torch.bfloat16, device="cpu")
    assert {call.feature.dtype for call in run(store, [0])} == {torch.bfloat16}


def test_branches_come_in_the_order_of_their_calls(tmp_path: Path) -> None:
    source = Guided(smooth(2), [[2 * feature for feature in path] for path in smooth(2)])
    store = record(tmp_path, source)
    assert store.branches == ("cond", "uncond")
    for got, want in zip(run(store, [1]), run(source, [1]), strict=True):
        assert got[:2] == want[:2] and torch.equal(got.feature, want.feature)


def test_two_models_that_take_turns_are_refused(tmp_path: Path) -> None:
    source = runs(2)

    def loop(chosen: Sequence[int], policy: StepPolicy) -> None:
        source.run(chosen, lambda call: policy(replace(call, model=int(call.step > 2))))

    turns = LoopSource(loop, 2, SIGMAS)
    with pytest.raises(ValueError, match=r"source must run one model, .* got a call of a second one at step 3"):
        record(tmp_path, turns)
    with pytest.raises(ValueError, match=r"source must run one model, .* got a call of a second one at step 3"):
        train(small_predictor(), turns, SCHEDULE, progress=False)


def test_training_on_it_is_training_on_the_source(tmp_path: Path) -> None:
    direct, stored = small_predictor(), small_predictor()
    train(direct, runs(3), SCHEDULE, progress=False)
    train(stored, record(tmp_path), SCHEDULE, progress=False)
    assert equal(direct, stored)


def test_features_are_copied_at_once(tmp_path: Path) -> None:
    def loop(runs: Sequence[int], policy: StepPolicy) -> None:
        feature = torch.empty(1, 3)
        for step in range(STEPS):
            policy(ModelCall(step, lambda step=step: feature.fill_(step)))  # type: ignore[misc]

    store = record(tmp_path, LoopSource(loop, 1, SIGMAS))
    assert [call.feature[0, 0].item() for call in run(store, [0])] == list(range(STEPS))


def test_complete_runs_are_kept(tmp_path: Path) -> None:
    def stop(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(tmp_path, Meddling(runs(3), 50, stop))
    assert files_in(tmp_path) == {"run-000000.safetensors", "run-000001.safetensors"}
    with pytest.raises(FileNotFoundError, match=r"index\.json: must be there"):
        FeatureStore(tmp_path)
    rest = Meddling(runs(3), -1, stop)
    store = record(tmp_path, rest)
    assert rest.calls == STEPS and len(store) == 3
    for got, want in zip(run(store, [0, 1, 2]), run(runs(3), [0, 1, 2]), strict=True):
        assert torch.equal(got.feature, want.feature)
    again = Meddling(runs(3), 0, stop)
    assert len(record(tmp_path, again)) == 3 and again.calls == 0


def test_the_size_is_shown_and_must_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = Meddling(runs(3), -1, lambda feature: feature)
    FeatureStore.record(tmp_path / "shown", source, model="small", dtype="float16")
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("3 runs of 5.2 kB need 15.6 kB") == 1, shown
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 15_000}))
    source.calls = 0
    with pytest.raises(OSError, match=r"must fit on the disk: 3 runs of 5\.2 kB need 15\.6 kB in .*, 15\.0 kB free"):
        record(tmp_path / "full", source, dtype="float16")
    assert source.calls == 2 and not files_in(tmp_path / "full")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "other"}, "must hold features of other, it holds those of small"),
        ({"sigmas": SIGMAS[:-1]}, "must hold runs of 19 steps, it holds 20"),
        ({"sigmas": [s**2 for s in SIGMAS]}, r"must have sigma 0\.2500 at step 10, it has 0\.5000"),
    ],
)
def test_what_is_not_meant_is_refused(tmp_path: Path, options: dict[str, object], message: str) -> None:
    record(tmp_path)
    FeatureStore(tmp_path, model="small", sigmas=torch.tensor(SIGMAS).tolist())
    with pytest.raises(ValueError, match=message):
        FeatureStore(tmp_path, **options)  # type: ignore[arg-type]


def test_a_file_that_is_not_whole_is_named(tmp_path: Path) -> None:
    record(tmp_path)
    file = tmp_path / "run-000001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"run-000001\.safetensors: must be a whole safetensors file"):
        FeatureStore(tmp_path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"run-000001\.safetensors: must be there, the store has 3 runs"):
        FeatureStore(tmp_path)
    file.write_bytes(whole)
    assert len(FeatureStore(tmp_path)) == 3
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: must be the index of a store"):
        FeatureStore(tmp_path)


def test_a_file_of_another_recording_is_named(tmp_path: Path) -> None:
    record(tmp_path / "one")
    record(tmp_path / "two", dtype="float16")
    file = tmp_path / "two" / "run-000001.safetensors"
    (tmp_path / "one" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"run-000001\.safetensors: .* dtype is float16, wanted None"):
        FeatureStore(tmp_path / "one")
    with pytest.raises(ValueError, match="dtype is float16, wanted bfloat16"):
        record(tmp_path / "two", dtype="bfloat16")
    (tmp_path / "two" / "index.json").unlink()
    with pytest.raises(ValueError, match="runs is 3, wanted 4"):
        record(tmp_path / "two", runs(4), dtype="float16")


def test_an_index_that_promises_more_is_refused(tmp_path: Path) -> None:
    record(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["branches"]["cond"]["shape"] = [1, 8, 17]
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"step 0 of 'cond' must have shape \[1, 8, 17\], got \[1, 8, 16\]"):
        FeatureStore(tmp_path)


def test_what_cannot_be_stored_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be None or one of float16, bfloat16, float8_e4m3fn, got 'int8'"):
        record(tmp_path, dtype="int8")
    with pytest.raises(FloatingPointError, match="run 1: feature cond/0002 must be finite"):
        record(tmp_path, Meddling(runs(2), STEPS + 2, lambda feature: feature * torch.nan))
    with pytest.raises(ValueError, match=r"run 1, step 2, branch 'cond': .* got .*'shape': \[2, 8, 16\]"):
        record(tmp_path, Meddling(runs(2), 2, lambda feature: torch.cat([feature, feature])))
    with pytest.raises(ValueError, match="run 1 left out cond/0001"):
        record(tmp_path, LoopSource(lambda runs, policy: [policy(ModelCall(0, lambda: torch.ones(1)))], 2, SIGMAS))  # type: ignore[arg-type]

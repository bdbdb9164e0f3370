"""The published training: what it computes, that it learns, that it is deterministic and keeps nothing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_training import QUICK, SCHEDULE, SIGMAS, STEPS, Guided, equal, runs, small_predictor, trajectories
from torch import Tensor

from lesa_kernels import LesaPredictor, Schedule
from lesa_kernels.ops import predict_l1_loss
from lesa_kernels.training import LoopSource, RecordedSource, TrainingConfig, TrainingResult, plot_losses, train
from lesa_kernels.training.learner import Learner
from lesa_kernels.training.progress import progress_bar, waiting
from lesa_kernels.trajectories import ModelCall, StepPolicy

FORECASTS = STEPS - len(small_predictor().plan(SIGMAS, SCHEDULE).full_steps)


def trained(config: TrainingConfig = QUICK) -> tuple[LesaPredictor, TrainingResult]:
    predictor = small_predictor()
    return predictor, train(predictor, runs(), SCHEDULE, config, progress=False)


def as_published(config: TrainingConfig, paths: list[list[Tensor]]) -> tuple[LesaPredictor, list[float]]:
    """The training written out: one list of features, torch's loss, optimiser and decay, one update a forecast."""
    predictor = small_predictor()
    full = predictor.plan(SIGMAS, SCHEDULE).full_steps
    phases = [(False, config.teacher_forcing_epochs), (True, config.closed_loop_epochs)]
    losses = []
    adam = torch.optim.AdamW(predictor.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    decay: torch.optim.lr_scheduler.LRScheduler
    decay = torch.optim.lr_scheduler.StepLR(adam, config.decay_every, config.decay_factor)
    for closed_loop, epochs in phases:
        if config.restart_each_phase:
            adam = torch.optim.AdamW(predictor.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
            decay = torch.optim.lr_scheduler.CosineAnnealingLR(
                adam, epochs * len(paths) * FORECASTS, config.learning_rate * config.decay_factor
            )
        for path in paths * epochs:
            history: list[Tensor] = []
            of_run = []
            for step, target in enumerate(path):
                if step in full:
                    history.append(target)
                    continue
                forecast = predictor(history, SIGMAS, SIGMAS[step])
                loss = torch.nn.functional.l1_loss(forecast, target)
                adam.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(predictor.parameters(), config.clip_norm)
                adam.step()
                decay.step()
                of_run.append(loss.item())
                history.append(forecast.detach() if closed_loop else target)
            losses.append(sum(of_run) / len(of_run))
    return predictor, losses


@pytest.mark.parametrize(
    "config",
    [
        TrainingConfig(1, 2, learning_rate=1e-3, decay_every=20, clip_norm=0.01),
        TrainingConfig(2, 1, learning_rate=1e-3, decay="cosine", decay_factor=0.1, restart_each_phase=True),
    ],
    ids=["published", "tuned"],
)
def test_it_computes_what_is_written_out(config: TrainingConfig) -> None:
    predictor = small_predictor()
    result = train(predictor, runs(3), SCHEDULE, config, progress=False)
    want, losses = as_published(config, trajectories(3))
    assert [*result.losses["teacher forcing"], *result.losses["closed loop"]] == pytest.approx(losses, rel=1e-4)
    moved = [(a - b).norm() for a, b in zip(small_predictor().parameters(), want.parameters(), strict=True)]
    for got, wanted, distance in zip(predictor.parameters(), want.parameters(), moved, strict=True):
        assert (got - wanted).norm() <= 0.02 * distance + 1e-7


def test_both_phases_lower_the_loss() -> None:
    _, result = trained()
    for phase in ("teacher forcing", "closed loop"):
        values = result.losses[phase]
        assert sum(values[-4:]) < 0.7 * sum(values[:4]), (phase, values)


def test_the_same_arguments_give_the_same_bits() -> None:
    quick = replace(QUICK, teacher_forcing_epochs=2, closed_loop_epochs=2, shuffle=True)
    (first, _), (second, _), (other, _) = trained(quick), trained(quick), trained(replace(quick, seed=1))
    assert equal(first, second) and not equal(first, other)


def test_published_settings_count_one_update_a_forecast() -> None:
    predictor = small_predictor()
    result = train(predictor, runs(2), SCHEDULE, progress=False)
    assert result.updates == 2 * (1 + 2) * FORECASTS
    assert {phase: len(values) for phase, values in result.losses.items()} == {"teacher forcing": 2, "closed loop": 4}
    assert TrainingConfig.published() == TrainingConfig() and TrainingConfig.tuned().restart_each_phase


def test_runs_are_played_in_the_order_of_the_seed() -> None:
    run: list[int] = []

    class Watched(RecordedSource):
        def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
            run.extend(runs)
            super().run(runs, policy)

    def order(**settings: object) -> list[int]:
        run.clear()
        config = replace(TrainingConfig(1, 1), **settings)  # type: ignore[arg-type]
        train(small_predictor(), Watched(trajectories(6), SIGMAS), SCHEDULE, config, progress=False)
        return list(run)

    assert order() == [*range(6), *range(6)]
    shuffled = order(shuffle=True)
    assert sorted(shuffled[:6]) == sorted(shuffled[6:]) == list(range(6)) and shuffled[:6] != shuffled[6:]
    assert order(shuffle=True) == shuffled and order(shuffle=True, seed=1) != shuffled


def test_a_batch_is_one_run_of_all_its_features() -> None:
    paths = trajectories(4)
    joined = [[torch.cat([paths[i][step], paths[i + 1][step]]) for step in range(STEPS)] for i in (0, 2)]
    batched, plain = small_predictor(), small_predictor()
    config = TrainingConfig(1, 1, batch_size=2)
    result = train(batched, RecordedSource(paths, SIGMAS), SCHEDULE, config, progress=False)
    want = train(plain, RecordedSource(joined, SIGMAS), SCHEDULE, TrainingConfig(1, 1), progress=False)
    assert equal(batched, plain) and result.losses == want.losses


def test_the_last_batch_of_an_epoch_may_be_smaller() -> None:
    result = train(small_predictor(), runs(3), SCHEDULE, TrainingConfig(1, 1, batch_size=2), progress=False)
    assert [len(losses) for losses in result.losses.values()] == [2, 2]


def test_each_branch_learns_as_if_alone() -> None:
    own, other = trajectories(2), [[2 * feature for feature in path] for path in trajectories(2)]
    both = {"cond": small_predictor(0), "uncond": small_predictor(1)}
    source = Guided(own, other)
    result = train(both, source, SCHEDULE, progress=False)
    alone = {"cond": small_predictor(0), "uncond": small_predictor(1)}
    train(alone["cond"], RecordedSource(own, SIGMAS), SCHEDULE, progress=False)
    train({"uncond": alone["uncond"]}, Guided(own, other), SCHEDULE, progress=False)
    assert equal(both["cond"], alone["cond"]) and equal(both["uncond"], alone["uncond"])
    assert result.updates == 2 * 3 * 2 * FORECASTS
    assert torch.equal(source.outputs[0], torch.tanh(own[0][0])), "the run must go on with the true output"


def test_no_more_than_the_window_is_kept() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def loop(runs: Sequence[int], policy: StepPolicy) -> None:
        nonlocal most
        for step in range(STEPS):
            feature = torch.randn(1, 4, 4)
            alive.append(weakref.ref(feature))
            policy(ModelCall(step, lambda feature=feature: feature))  # type: ignore[misc]
            del feature
            most = max(most, sum(ref() is not None for ref in alive))

    train(small_predictor(), LoopSource(loop, 2, SIGMAS), SCHEDULE, TrainingConfig(1, 1), progress=False)
    assert most <= 1, "features are copied into the ring and let go"


def test_history_lies_in_slots_that_are_allocated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bool] = []
    slots: set[int] = set()

    def watched(history: Sequence[Tensor], target: Tensor, *parameters: Tensor, out: Tensor | None) -> Tensor:
        written.append(out is not None)
        slots.update(feature.data_ptr() for feature in [*history, *([] if out is None else [out])])
        return predict_l1_loss(history, target, *parameters, out=out)

    monkeypatch.setattr("lesa_kernels.training.learner.predict_l1_loss", watched)
    train(small_predictor(), runs(2), SCHEDULE, TrainingConfig(1, 1), progress=False)
    assert written == [False] * 2 * FORECASTS + [True] * 2 * FORECASTS, "with true history no forecast is written"
    assert len(slots) == 1 + 3, "the longest window, and the forecast"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_of_low_precision_train_float32_parameters(dtype: torch.dtype) -> None:
    predictor = small_predictor()
    result = train(predictor, runs(dtype=dtype), SCHEDULE, QUICK, progress=False)
    assert result.losses["closed loop"][-1] < 0.7 * result.losses["closed loop"][0]
    assert all(parameter.dtype == torch.float32 for parameter in predictor.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_source_may_sample_in_any_mode(mode: type[torch.no_grad]) -> None:
    plain, other = small_predictor(), small_predictor()
    paths = trajectories(2)
    recorded = RecordedSource(paths, SIGMAS)

    def loop(runs: Sequence[int], policy: StepPolicy) -> None:
        with mode():
            RecordedSource([[feature * 1 for feature in path] for path in paths], SIGMAS).run(runs, policy)

    train(plain, recorded, SCHEDULE, progress=False)
    with mode():
        train(other, LoopSource(loop, 2, SIGMAS), SCHEDULE, progress=False)
    assert equal(plain, other)


def test_wrong_input_is_named() -> None:
    predictor = LesaPredictor(STEPS, ((0.0, 2),), 8)
    with pytest.raises(ValueError, match="leave a step to forecast"):
        train(predictor, runs(1), Schedule.explicit(STEPS, range(STEPS)), progress=False)
    with pytest.raises(ValueError, match="at least one branch"):
        train({}, runs(1), SCHEDULE, progress=False)
    with pytest.raises(ValueError, match="at least one run"):
        train(predictor, LoopSource(lambda runs, policy: None, 0, SIGMAS), SCHEDULE, progress=False)
    with pytest.raises(ValueError, match="all 20 steps of branch 'uncond', the last was -1"):
        train({"uncond": predictor}, runs(1), SCHEDULE, progress=False)
    with pytest.raises(TypeError, match="must be float32"):
        train(predictor.bfloat16(), runs(1), SCHEDULE, progress=False)


def test_a_source_that_leaves_out_a_step_is_refused() -> None:
    def loop(runs: Sequence[int], policy: StepPolicy) -> None:
        for step in (0, 1, 3):
            policy(ModelCall(step, lambda: torch.ones(2)))

    with pytest.raises(ValueError, match="branch 'cond' came to step 3 after step 1"):
        train(LesaPredictor(STEPS, ((0.0, 2),), 8), LoopSource(loop, 1, SIGMAS), SCHEDULE, progress=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.randn(3), r"feature of step 4 \(teacher forcing phase, epoch 0, run 1\) must have shape \(1, 8, 16\)"),
        (torch.randn(1, 8, 16).double(), "feature of step 4 .* must have dtype float32"),
    ],
)
def test_a_run_of_mixed_features_is_named(wrong: Tensor, message: str) -> None:
    paths = trajectories(2)
    paths[1][4] = wrong
    with pytest.raises((ValueError, TypeError), match=message):
        train(LesaPredictor(STEPS, ((0.0, 2),), 8), RecordedSource(paths, SIGMAS), SCHEDULE, progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "linear"}, 'decay must be "step" or "cosine"'),
        ({"teacher_forcing_epochs": -1}, "teacher_forcing_epochs must be at least 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0, got 0.0"),
        ({"learning_rate": math.nan}, "learning_rate must be finite, got nan"),
        ({"weight_decay": math.nan}, "weight_decay must be finite, got nan"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)  # type: ignore[arg-type]


def test_the_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")
    predictor = LesaPredictor(STEPS, ((0.0, 2),), 8)
    result = train(predictor, runs(2), SCHEDULE, progress=False)
    path = plot_losses({"published": result}, tmp_path / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG") and [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_small_updates_compute_with_one_thread_and_the_source_with_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads on two busy cores wait for each other: a training of seconds was not done after minutes."""
    threads: dict[str, set[int]] = {"source": set(), "updates": set()}
    learn = Learner.learn

    def watched(self: Learner, step: int, feature: Tensor) -> None:
        threads["updates"].add(torch.get_num_threads())
        learn(self, step, feature)

    class Threads(RecordedSource):
        def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
            threads["source"].add(torch.get_num_threads())
            super().run(runs, policy)
            threads["source"].add(torch.get_num_threads())

    monkeypatch.setattr(Learner, "learn", watched)
    torch.set_num_threads(2)
    train(small_predictor(), Threads(trajectories(1), SIGMAS), SCHEDULE, TrainingConfig(1, 0), progress=False)
    assert threads == {"source": {2}, "updates": {1}}


def test_a_narrow_terminal_keeps_the_numbers_of_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as bar:
        bar.update(bar.add_task("a description that is much longer than the line " * 2, total=72), advance=7)
    with waiting("loading"):
        pass
    shown = capsys.readouterr().out
    assert " 7/72 " in shown and "0:00:00" in shown and "loading" in shown
    with progress_bar(show=False), waiting("loading", show=False):
        pass
    assert not capsys.readouterr().out

"""A value that is not finite stops the training, is named, and destroys nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_training import SCHEDULE, SIGMAS, Guided, Meddling, equal, runs, small_predictor, trajectories
from torch import Tensor

from lesa_kernels import LesaPredictor
from lesa_kernels.training import RecordedSource, TrainingConfig, train

ONCE = TrainingConfig(1, 0)
FULL = SCHEDULE.full_steps
FORECAST = next(step for step in range(20) if step not in FULL and step > 8)


def spoilt(run: int, step: int, value: float = torch.inf, count: int = 4) -> RecordedSource:
    paths = trajectories(count)
    paths[run][step] = paths[run][step].clone()
    paths[run][step].view(-1)[3] = value
    return RecordedSource(paths, SIGMAS)


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_a_target_is_named(value: float) -> None:
    message = rf"the target is not finite at step {FORECAST} of branch 'cond' \(teacher forcing phase, epoch 0, run 2\)"
    with pytest.raises(FloatingPointError, match=message):
        train(small_predictor(), spoilt(2, FORECAST, value), SCHEDULE, ONCE, progress=False)


def test_a_feature_of_the_history_is_named() -> None:
    full = next(step for step in FULL if step > 8)
    message = rf"history\[2\] \(the feature of step {full}\) is not finite at step {full + 1} .*run 1"
    with pytest.raises(FloatingPointError, match=message):
        train(small_predictor(), spoilt(1, full), SCHEDULE, ONCE, progress=False)


def test_a_forecast_that_does_not_fit_its_dtype_is_named() -> None:
    paths = [[torch.full((1, 4), 3e4 * (1 + step / 20)) for step in range(20)]]
    predictor = LesaPredictor(20, ((0.0, 2),), 8)
    with torch.no_grad():
        predictor.latent[0].weight.fill_(1e6)
    source = RecordedSource([[feature.half() for feature in path] for path in paths], SIGMAS)
    message = r"history\[1\] \(the forecast of step \d\) is not finite .* \(closed loop phase"
    with pytest.raises(FloatingPointError, match=message):
        train(predictor, source, SCHEDULE, TrainingConfig(0, 1), progress=False)


def test_a_parameter_is_named() -> None:
    predictor = small_predictor()

    def spoil(parameter: Tensor) -> None:
        parameter.data.fill_(torch.nan)

    predictor.timestep[1].layers[0].base_weight.register_post_accumulate_grad_hook(spoil)
    with pytest.raises(FloatingPointError, match=r"the parameter timestep\.1\.layers\.0\.base_weight is not finite"):
        train(predictor, runs(), SCHEDULE, ONCE, progress=False)
    assert equal(predictor, small_predictor())


def test_a_forecast_is_named() -> None:
    predictor = small_predictor()
    with torch.no_grad():
        predictor.latent[1].weight.fill_(3e38)
    with pytest.raises(FloatingPointError, match="the forecast is not finite"):
        train(predictor, runs(), SCHEDULE, ONCE, progress=False)


def test_a_gradient_is_named_though_the_loss_is_finite() -> None:
    predictor = small_predictor()
    predictor.latent[2].bias.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match=r"the gradient of latent\.2\.bias is not finite .*run 0"):
        train(predictor, runs(), SCHEDULE, ONCE, progress=False)


def test_the_branch_is_named() -> None:
    paths = trajectories(1)
    paths[0][FORECAST] = paths[0][FORECAST] * torch.nan
    both = {"cond": small_predictor(), "uncond": small_predictor()}
    with pytest.raises(FloatingPointError, match=r"the target is not finite .* of branch 'uncond'"):
        train(both, Guided(trajectories(1), paths), SCHEDULE, ONCE, progress=False)


def test_a_source_that_does_not_repeat_is_named() -> None:
    source = Meddling(runs(), 20 + FORECAST, lambda feature: feature * torch.nan)
    with pytest.raises(FloatingPointError, match=rf"step {FORECAST} of branch 'cond' .*sampled again the source gave"):
        train(small_predictor(), source, SCHEDULE, ONCE, progress=False)


def test_the_last_good_state_is_kept_and_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")
    config = replace(ONCE, learning_rate=1e-3)
    before, want = small_predictor(), small_predictor()
    train(before, runs(2), SCHEDULE, config, progress=False)
    result = train(want, runs(4), SCHEDULE, config, progress=False)
    stopped = small_predictor()
    with pytest.raises(FloatingPointError, match="run 2"):
        train(stopped, spoilt(2, FORECAST), SCHEDULE, config, out=tmp_path, progress=False)
    assert equal(stopped, before) and equal(LesaPredictor.from_pretrained(tmp_path), before)
    mended = small_predictor(5)
    assert train(mended, runs(4), SCHEDULE, config, out=tmp_path, progress=False).losses == result.losses
    assert equal(mended, want)


def test_a_first_batch_that_fails_leaves_a_predictor_and_binds_nobody(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")
    with pytest.raises(FloatingPointError, match="run 0"):
        train(small_predictor(), spoilt(0, FORECAST), SCHEDULE, ONCE, out=tmp_path, progress=False)
    assert equal(LesaPredictor.from_pretrained(tmp_path), small_predictor())
    other = replace(ONCE, learning_rate=1e-3)
    assert train(small_predictor(), runs(1), SCHEDULE, other, out=tmp_path, progress=False).updates > 0


def test_losses_are_read_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    for name in ("tolist", "item", "__bool__", "__float__", "__int__"):
        original = getattr(Tensor, name)

        def counted(self: Tensor, original: Callable[[Tensor], object] = original) -> object:
            nonlocal reads
            reads += 1
            return original(self)

        monkeypatch.setattr(Tensor, name, counted)

    def of(epochs: int) -> int:
        nonlocal reads
        reads = 0
        train(small_predictor(), runs(), SCHEDULE, TrainingConfig(epochs, epochs), progress=False)
        return reads

    assert of(3) - of(1) == 2 * 2 * len(runs()), "what a training reads must grow by one a batch"

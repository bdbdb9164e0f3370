"""The published training: it learns, it is deterministic, and it stops loudly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lesa_kernels import LesaPredictor, Schedule
from lesa_kernels.training import TrainingConfig, plot_losses, train

STEPS = 20
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
SCHEDULE = Schedule.interval(STEPS, 4)
QUICK = TrainingConfig(10, 10, learning_rate=1e-2, decay="cosine", restart_each_phase=True)


def _trajectories(count: int = 4) -> list[list[Tensor]]:
    """Smooth paths between two random features, as a sampling run's are."""
    torch.manual_seed(3)
    paths = []
    for _ in range(count):
        start, end = torch.randn(2, 8, 16)
        paths.append([t * start + (1 - t) * end + 0.3 * t * (1 - t) * start for t in SIGMAS[:-1]])
    return paths


def _trained(config: TrainingConfig = QUICK) -> tuple[LesaPredictor, dict[str, list[float]]]:
    torch.manual_seed(0)
    predictor = LesaPredictor(num_steps=STEPS, stages=((0.7, 2), (0.4, 3), (0.0, 3)), hidden_dim=16)
    result = train(predictor, _trajectories(), SIGMAS, SCHEDULE, config, progress=False)
    return predictor, dict(result.losses)


def test_both_phases_lower_the_loss() -> None:
    _, losses = _trained()
    for phase in ("guided", "closed loop"):
        values = losses[phase]
        assert sum(values[-4:]) < 0.7 * sum(values[:4]), (phase, values)


def test_same_seed_same_parameters() -> None:
    (first, _), (second, _) = _trained(), _trained()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_published_settings_count_one_update_a_forecast() -> None:
    torch.manual_seed(0)
    predictor = LesaPredictor(num_steps=STEPS, stages=((0.7, 2), (0.0, 3)), hidden_dim=8)
    result = train(predictor, _trajectories(2), SIGMAS, SCHEDULE, progress=False)
    forecasts = STEPS - len(predictor.plan(SIGMAS, SCHEDULE).full_steps)
    assert result.updates == 2 * (1 + 2) * forecasts
    assert {phase: len(values) for phase, values in result.losses.items()} == {"guided": 2, "closed loop": 4}


def test_a_loss_that_is_not_finite_stops_and_is_named() -> None:
    trajectories = _trajectories()
    trajectories[1][5] = trajectories[1][5] * torch.inf
    with pytest.raises(FloatingPointError, match=r"step 5 \(guided phase, trajectory 1\)"):
        train(
            LesaPredictor(STEPS, ((0.0, 2),), 8),
            trajectories,
            SIGMAS,
            Schedule.explicit(STEPS, [0, 1, 9]),
            progress=False,
        )


def test_wrong_input_is_named() -> None:
    predictor = LesaPredictor(STEPS, ((0.0, 2),), 8)
    with pytest.raises(ValueError, match="at least one run"):
        train(predictor, [], SIGMAS, SCHEDULE)
    with pytest.raises(ValueError, match=r"trajectories\[0\] must hold 20 features, got 19"):
        train(predictor, [_trajectories(1)[0][:-1]], SIGMAS, SCHEDULE)
    with pytest.raises(ValueError, match="leave a step to forecast"):
        train(predictor, _trajectories(1), SIGMAS, Schedule.explicit(STEPS, range(STEPS)))
    with pytest.raises(TypeError, match="must be float32"):
        train(predictor.bfloat16(), _trajectories(1), SIGMAS, SCHEDULE)


def test_a_trajectory_of_mixed_shapes_is_named() -> None:
    trajectories = _trajectories(2)
    trajectories[1][4] = torch.randn(3)
    with pytest.raises(ValueError, match=r"trajectories\[1\]\[4\] must have shape \(8, 16\)"):
        train(LesaPredictor(STEPS, ((0.0, 2),), 8), trajectories, SIGMAS, SCHEDULE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decay": "linear"}, 'decay must be "step" or "cosine"'),
        ({"guided_epochs": -1}, "guided_epochs must not be negative"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)  # type: ignore[arg-type]


def test_training_works_where_gradients_are_off() -> None:
    with torch.no_grad():
        result = train(LesaPredictor(STEPS, ((0.0, 2),), 8), _trajectories(1), SIGMAS, SCHEDULE, progress=False)
    assert result.updates > 0


def test_the_plot_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")
    torch.manual_seed(0)
    predictor = LesaPredictor(STEPS, ((0.0, 2),), 8)
    result = train(predictor, _trajectories(2), SIGMAS, SCHEDULE, progress=False)
    path = plot_losses({"published": result}, tmp_path / "loss.png")
    assert path.read_bytes().startswith(b"\x89PNG")

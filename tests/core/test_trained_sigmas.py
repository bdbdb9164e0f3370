"""A LESA predictor knows the sigmas of its training, takes them along, and serves no others unasked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lesa_kernels import LesaPredictor, Reuse, Schedule
from lesa_kernels.training import RecordedSource, TrainingConfig, train

SIGMAS = [1.0, 0.8, 0.55, 0.3, 0.1, 0.0]
OTHERS = [1.0, 0.8, 0.6, 0.3, 0.1, 0.0]
SCHEDULE = Schedule.explicit(5, [0, 3])


def predictor(sigmas: list[float] | None = None) -> LesaPredictor:
    return LesaPredictor(5, stages=((0.5, 1), (0.0, 2)), hidden_dim=4, trained_sigmas=sigmas)


def test_they_are_saved_with_the_weights(tmp_path: Path) -> None:
    for name, sigmas in (("known", SIGMAS), ("unknown", None)):
        predictor(sigmas).save_pretrained(tmp_path / name)
        loaded = LesaPredictor.from_pretrained(tmp_path / name)
        assert loaded.trained_sigmas == (None if sigmas is None else tuple(sigmas))
    later = predictor()
    later.trained_sigmas = torch.tensor(SIGMAS, dtype=torch.float64)
    later.save_pretrained(tmp_path / "later")
    assert LesaPredictor.from_pretrained(tmp_path / "later").trained_sigmas == tuple(SIGMAS)


def test_training_sets_them() -> None:
    trained = predictor(OTHERS)
    trajectory = [torch.randn(3) for _ in range(5)]
    train(trained, RecordedSource([trajectory], SIGMAS), SCHEDULE, TrainingConfig(closed_loop_epochs=0), progress=False)
    assert trained.trained_sigmas == tuple(SIGMAS)


def test_a_plan_for_other_sigmas_is_refused_or_made_all_the_same() -> None:
    rounded = torch.tensor(SIGMAS).tolist()
    assert predictor(SIGMAS).plan(rounded, SCHEDULE).full_steps == (0, 3)
    with pytest.raises(ValueError, match=r"trained for other sigmas: 0\.5500 at step 2 of 5, not 0\.6000; on_other_"):
        predictor(SIGMAS).plan(OTHERS, SCHEDULE)
    for made, sigmas in ((predictor(SIGMAS), OTHERS), (predictor(), OTHERS), (Reuse(), OTHERS)):
        assert made.plan(sigmas, SCHEDULE, on_other_sigmas="adapt").full_steps == (0, 3)
    with pytest.raises(ValueError, match='on_other_sigmas must be "refuse" or "adapt", got \'no\''):
        predictor(SIGMAS).plan(SIGMAS, SCHEDULE, on_other_sigmas="no")  # type: ignore[arg-type]


def test_there_are_as_many_as_the_network_takes() -> None:
    with pytest.raises(ValueError, match=r"num_steps \+ 1 = 6 values, got 2"):
        predictor([1.0, 0.0])

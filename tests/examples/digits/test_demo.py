"""The demo of the digits model: solvers, figures of merit, and the whole run at a small size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: demo)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: demo)")

from rich.console import Console
from typer.testing import CliRunner

from examples.digits import comparison
from examples.digits.__main__ import app
from examples.digits.demo import DemoConfig, run_demo
from examples.digits.model import initial_noise, load_model, sample, scheduler, set_up
from examples.digits.solvers import solve
from lesa_kernels import LesaPredictor, Reuse, Schedule
from lesa_kernels.cli import app as lesa_app
from lesa_kernels.training import TrainingConfig

LABELS = torch.arange(4)


def test_euler_over_all_steps_is_the_scheduler() -> None:
    model, noise = load_model(), initial_noise(4, seed=5)
    sigmas = set_up(scheduler(), 12).tolist()
    torch.testing.assert_close(
        solve(model, noise, LABELS, sigmas, 1), sample(model, noise, LABELS, 12), rtol=1e-4, atol=1e-4
    )


def test_the_second_order_solver_converges_faster() -> None:
    model, noise = load_model(), initial_noise(4, seed=5)

    def at(steps: int, order: int) -> torch.Tensor:
        return solve(model, noise, LABELS, set_up(scheduler(), steps).tolist(), 2 if order == 2 else 1)

    fine = at(120, 2)
    assert (at(30, 2) - fine).norm() < 0.5 * (at(30, 1) - fine).norm()


def test_schedules_have_the_calls_they_promise() -> None:
    sigmas = set_up(scheduler(), 50).tolist()
    for calls in comparison.INTERVALS:
        found = comparison.schedules(sigmas, calls)
        assert set(found) == {comparison.PUBLISHED, comparison.UNIFORM, comparison.WARM_UNIFORM}
        assert all(len(schedule.full_steps) == calls for schedule in found.values())


def test_a_run_counts_what_ran() -> None:
    model, sigmas = load_model(), set_up(scheduler(), 50).tolist()
    noise = initial_noise(2, seed=5)
    schedule = Schedule.explicit(50, [0, 20, 40])
    cached = comparison.run(model, noise, LABELS[:2], sigmas, comparison.Method("reuse", "", schedule, Reuse()))
    solver = comparison.run(model, noise, LABELS[:2], sigmas, comparison.Method("Euler", "", schedule))
    assert cached.block_calls == 3 and solver.block_calls == 3
    assert len(cached.features) == 50 and not solver.features
    assert torch.equal(cached.features[21], cached.features[20]) and not torch.equal(
        cached.features[40], cached.features[39]
    )


def test_psnr_and_feature_error() -> None:
    images = torch.zeros(3, 28, 28)
    mean, error = comparison.psnr(images + 0.2, images)
    assert math.isclose(mean, 20.0, abs_tol=1e-4) and error < 1e-4
    assert comparison.psnr(images + 5, images + 1)[0] > 100, "beyond black and white nothing is seen"
    reference = [torch.ones(4), 2 * torch.ones(4)]
    assert math.isclose(comparison.feature_error(reference[:1] * 2, reference, Schedule.explicit(2, [0])), 0.5)


def test_the_demo_writes_what_it_says(tmp_path: Path) -> None:
    quick = TrainingConfig(1, 1, learning_rate=3e-3)
    config = DemoConfig(tmp_path, samples=10, calls=(10,), extra_calls=(6,), trajectories=1, batch=4, training=quick)
    rows = run_demo(config, Console(quiet=True))
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["rows"]) == len(rows) and results["reference"]["block_calls"] == 50
    found = {(row.method, row.schedule, row.block_calls) for row in rows}
    assert ("LESA", comparison.PUBLISHED, 10) in found and ("LESA", comparison.WARM_UNIFORM, 10) in found
    for name in ("reuse", "TaylorSeer 2, sigma", "TaylorSeer 2, steps", "Euler, fewer steps"):
        for schedule in (comparison.PUBLISHED, comparison.UNIFORM):
            assert (name, schedule, 10) in found and (name, schedule, 6) in found
    assert all(row.block_calls == len(row.full_steps) for row in rows)
    for name in ("images.png", "quality.png", "loss.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    LesaPredictor.from_pretrained(str(tmp_path / "predictors" / "10-calls-published"))


def test_the_command_names_what_is_missing() -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    result = CliRunner().invoke(app, ["--device", "cuda"])
    assert result.exit_code == 2 and "sees no CUDA device" in " ".join(result.output.replace("│", " ").split())


def test_the_command_refuses_other_devices() -> None:
    result = CliRunner().invoke(app, ["--device", "tpu"])
    assert result.exit_code == 2 and "got tpu" in " ".join(result.output.replace("│", " ").split())


def test_lesa_status_prints() -> None:
    result = CliRunner().invoke(lesa_app, ["status"])
    assert result.exit_code == 0 and "predict" in result.output


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("examples.digits.demo.load_model", lambda device: pytest.fail("nothing is to be sampled"))
    with pytest.raises(NotADirectoryError, match="file/out"):
        run_demo(DemoConfig(tmp_path / "file" / "out"), Console(quiet=True))

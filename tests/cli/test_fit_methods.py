"""`lesa train` with the methods that fit coefficients, and with budgets."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: train)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")

from digits_command import load, write_prompts
from typer.testing import CliRunner

import lesa_kernels as lesa
from examples.digits.pipeline import DigitsPipeline
from lesa_kernels.cli import app
from lesa_kernels.training.checkpoint import FILE

DIGITS = ["--model", "digits", "--steps", "12", "--batch", "4"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lesa_kernels.integrations.sampling.load_pipeline", load)


def run(out: Path, *arguments: str) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        prompts = write_prompts(Path(folder), 4)
        return CliRunner().invoke(app, ["train", *DIGITS, "--prompts", prompts, "--out", str(out), *arguments])


@pytest.mark.parametrize(
    ("method", "kind"),
    [("tail", lesa.LinearPredictor), ("lesa-tail", lesa.LesaPredictor)],
)
def test_a_fit_serves_the_pipeline_with_its_own_schedule(method: str, kind: type, tmp_path: Path) -> None:
    result = run(tmp_path, "--method", method, "--calls", "4")
    assert result.exit_code == 0, result.output
    predictor = lesa.load_predictor(tmp_path)
    assert isinstance(predictor, kind)
    pipe = DigitsPipeline.load()
    lesa.enable(pipe, predictor)
    pipe("7", num_inference_steps=12, output_type="pt")
    summary = lesa.summary(pipe)
    assert (summary.full, summary.forecast) == (4, 8)
    assert predictor.schedule is not None
    assert len(predictor.schedule.full_steps) == 4


def test_without_a_budget_a_fit_takes_a_fifth_of_the_steps(tmp_path: Path) -> None:
    result = run(tmp_path, "--method", "tail")
    assert result.exit_code == 0, result.output
    schedule = lesa.load_predictor(tmp_path).schedule
    assert schedule is not None
    assert len(schedule.full_steps) == 3


def test_budgets_choose_the_calls(tmp_path: Path) -> None:
    by_bound = run(tmp_path, "--method", "tail", "--decibels", "20", "--search", "3")
    assert by_bound.exit_code == 0, by_bound.output
    assert "TaylorSeer there:" in by_bound.output
    schedule = lesa.load_predictor(tmp_path).schedule
    assert schedule is not None
    assert len(schedule.full_steps) < 12
    too_short = run(tmp_path, "--method", "tail", "--seconds", "0.000001")
    assert too_short.exit_code == 2
    assert "seconds must allow one full call" in " ".join(too_short.output.replace("│", " ").split())


def test_a_placement_is_refined_by_fits(tmp_path: Path) -> None:
    result = run(tmp_path, "--method", "tail", "--calls", "4", "--refine", "3")
    assert result.exit_code == 0, result.output
    assert "fitted there:" in result.output
    assert "after 3 placements" in result.output
    assert "TaylorSeer there" not in result.output
    schedule = lesa.load_predictor(tmp_path).schedule
    assert schedule is not None
    assert len(schedule.full_steps) == 4
    refused = run(tmp_path / "other", "--method", "tuned", "--refine", "3")
    assert refused.exit_code == 2
    assert "--refine" in refused.output


def test_a_fit_does_not_take_the_place_of_a_training(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"")
    refused = run(tmp_path, "--method", "tail", "--calls", "4")
    assert refused.exit_code == 2
    assert "holds a training; take another folder" in " ".join(refused.output.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_same_command_gives_the_same_coefficients(tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert run(tmp_path / name, "--method", "tail", "--calls", "4").exit_code == 0
    first, second = (lesa.load_predictor(tmp_path / name) for name in ("first", "second"))
    assert torch.equal(first.coefficients.nan_to_num(), second.coefficients.nan_to_num())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "tail", "--epochs", "1", "1"], "--epochs, --learning-rate and --tensorboard are not for"),
        (["--method", "tuned", "--search", "3"], "are for the methods that fit"),
        (["--calls", "3", "--decibels", "20"], "say which steps are full: give one"),
    ],
)
def test_what_does_not_fit_together_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    result = run(tmp_path, *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("method", ["tuned", "tail"])
def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")

    def run_nothing(*_: Any) -> None:
        raise AssertionError("nothing is to be run")

    monkeypatch.setattr("lesa_kernels.integrations.sampling.PipelineSource.run", run_nothing)
    result = run(tmp_path / "file" / "out", "--method", method)
    assert result.exit_code == 2
    assert "Not a directory" in " ".join(result.output.split())

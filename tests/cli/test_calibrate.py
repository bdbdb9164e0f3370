"""`lesa calibrate`: full steps for a budget, a fit, and a predictor that serves the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: train)")

from digits_command import load, message, use, write_prompts
from typer.testing import CliRunner

import lesa_kernels as lesa
from examples.digits.pipeline import DigitsPipeline
from lesa_kernels.cli import app
from lesa_kernels.integrations import pipeline_source
from lesa_kernels.training.checkpoint import FILE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_source, "load_pipeline", load)


def run(out: Path, prompts: Path, *arguments: str) -> Any:
    given = ["calibrate", "digits", "--prompts", write_prompts(prompts, 4), "--out", str(out), "--batch", "4"]
    return CliRunner().invoke(app, [*given, "--steps", "12", *arguments])


def full_steps(folder: Path) -> tuple[int, ...]:
    schedule = lesa.load_predictor(folder).schedule
    assert schedule is not None
    return schedule.full_steps


@pytest.mark.parametrize(("form", "kind"), [("coefficients", lesa.LinearPredictor), ("lesa", lesa.LesaPredictor)])
def test_a_fit_serves_the_pipeline_with_its_own_schedule(form: str, kind: type, tmp_path: Path) -> None:
    result = run(tmp_path / "out", tmp_path, "--form", form, "--calls", "4", "--search", "0")
    assert result.exit_code == 0, result.output
    assert isinstance(lesa.load_predictor(tmp_path / "out"), kind)
    pipe = DigitsPipeline.load()
    use(result.output, pipe)
    pipe("7", num_inference_steps=12, output_type="pt")
    summary = lesa.summary(pipe)
    assert (summary.full, summary.forecast) == (4, 8)
    sigmas = pipeline_source.PipelineSource(pipe, ["1"], steps=12).sigmas if lesa.disable(pipe) is None else ()
    assert full_steps(tmp_path / "out") == lesa.Schedule.uniform_in_sigma(sigmas, 4).full_steps


def test_without_a_budget_it_takes_a_fifth_of_the_steps_and_searches_for_them(tmp_path: Path) -> None:
    result = run(tmp_path / "out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "TaylorSeer's best of" in result.output
    assert len(full_steps(tmp_path / "out")) == 3


def test_budgets_choose_the_calls(tmp_path: Path) -> None:
    by_bound = run(tmp_path / "bound", tmp_path, "--psnr-db", "20", "--search", "3")
    assert by_bound.exit_code == 0, by_bound.output
    assert len(full_steps(tmp_path / "bound")) < 12


def test_a_schedule_is_refined_by_fits(tmp_path: Path) -> None:
    result = run(tmp_path / "out", tmp_path, "--calls", "4", "--search", "0", "--refine", "3")
    assert result.exit_code == 0, result.output
    assert "a fit's best of 3 schedules:" in result.output
    assert "TaylorSeer's best" not in result.output
    assert len(full_steps(tmp_path / "out")) == 4


def test_a_fit_does_not_take_the_place_of_a_training(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE).write_bytes(b"")
    refused = run(tmp_path / "out", tmp_path, "--calls", "4")
    assert "holds a training; take another folder" in message(refused)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FILE]


def test_the_same_command_gives_the_same_coefficients(tmp_path: Path) -> None:
    for name in ("first", "second"):
        assert run(tmp_path / name, tmp_path, "--calls", "4", "--search", "2").exit_code == 0
    first, second = (lesa.load_predictor(tmp_path / name) for name in ("first", "second"))
    assert torch.equal(first.coefficients.nan_to_num(), second.coefficients.nan_to_num())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--calls", "3", "--psnr-db", "20"], "give one budget: --calls or --psnr-db"),
        (["--psnr-db", "20", "--search", "0"], "--psnr-db needs a --search of at least 1"),
        (["--calls", "60"], "--calls must be below --steps 12"),
        (["--calls", "12", "--search", "0"], "--calls must be below --steps 12"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    assert expected in message(run(tmp_path / "out", tmp_path, *arguments))


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pipeline_source, "load_pipeline", lambda *_, **__: pytest.fail("nothing is to be loaded"))
    assert "Not a directory" in message(run(tmp_path / "file" / "out", tmp_path))


def test_ctrl_c_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline_source.PipelineSource, "run", interrupt)
    result = run(tmp_path / "out", tmp_path)
    assert result.exit_code == 130 and "Interrupted, nothing is saved." in result.output

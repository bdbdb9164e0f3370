"""`lesa calibrate`: full steps for a budget, a fit, and a predictor that serves the pipeline."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: train)")

from digits_command import load, message, use, write_prompts
from PIL import Image
from typer.testing import CliRunner

import lesa_kernels as lesa
from examples.digits.pipeline import DigitsPipeline
from examples.emoji.emoji_pipeline import EmojiPipeline
from lesa_kernels.cli import app
from lesa_kernels.integrations import pipeline_source
from lesa_kernels.training import SolverFits, even_schedules, search_schedule
from lesa_kernels.training.checkpoint import FILE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_source, "load_pipeline", load)


def run(out: Path, prompts: Path, *arguments: str) -> Any:
    given = ["calibrate", "digits", "--prompts", write_prompts(prompts, 4), "--out", str(out), "--batch", "4"]
    return CliRunner().invoke(app, [*given, "--steps", "12", *arguments])


@pytest.fixture
def _enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let two prompts be enough for a search."""
    monkeypatch.setattr(sys.modules["lesa_kernels.cli.calibrate"], "_FEW_RUNS", 2)


def full_steps(folder: Path) -> tuple[int, ...]:
    schedule = lesa.load_predictor(folder).schedule
    assert schedule is not None
    return schedule.full_steps


@pytest.mark.parametrize(
    ("form", "kind"),
    [("solver", lesa.SolverPredictor), ("coefficients", lesa.LinearPredictor)],
)
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
    assert full_steps(tmp_path / "out") == even_schedules(sigmas, 4)[0].full_steps
    assert "before the search" not in result.output, "nothing is judged where nothing is searched"


@pytest.mark.usefixtures("_enough")
def test_the_learned_solver_is_the_default_and_its_calls_are_told_before(tmp_path: Path) -> None:
    result = run(tmp_path / "out", tmp_path, "--calls", "4", "--search", "5")
    assert result.exit_code == 0, result.output
    assert isinstance(lesa.load_predictor(tmp_path / "out"), lesa.SolverPredictor)
    told = "48 before the search, at most 80 for 5 placements of 4 full steps\n"
    assert result.output.index(told) < result.output.index("s a call: at most") < result.output.index("dB\n")
    assert "the best of 5 placements:" in result.output
    assert not (tmp_path / "out" / "curve.png").exists()


@pytest.mark.usefixtures("_enough")
def test_without_a_budget_it_takes_a_fifth_of_the_steps_and_draws_others(tmp_path: Path) -> None:
    result = run(tmp_path / "out", tmp_path, "--search", "4")
    assert result.exit_code == 0, result.output
    assert "at most 48 for 4 placements of 3 full steps and 108 for the curve" in result.output
    assert "no budget was given: 3 calls are a fifth of the steps" in result.output
    lines = [line.partition(": 2: ")[0] for line in result.output.splitlines() if line.startswith("dB by calls")]
    methods = ["placed like the best of 3", "evenly spaced", "Euler's method, as many steps"]
    assert lines == [f"dB by calls, {method}" for method in methods]
    assert len(full_steps(tmp_path / "out")) == 3
    with Image.open(tmp_path / "out" / "curve.png") as image:
        assert image.format == "PNG"


def test_the_calls_that_are_told_are_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits: list[SolverFits] = []
    made = SolverFits.__init__

    def keep(self: SolverFits, *given: Any, **options: Any) -> None:
        made(self, *given, **options)
        fits.append(self)

    monkeypatch.setattr(SolverFits, "__init__", keep)
    result = run(tmp_path / "out", tmp_path, "--search", "6", "--calls", "3")
    told = int(result.output.partition(" before the search")[0].split()[-1])
    bound = int(result.output.partition("at most ")[2].split()[0])
    (fit,) = fits
    final = 4 * 3
    assert told == 4 * 12
    assert told < fit.model_calls - final <= told + bound


def test_a_bound_chooses_the_calls(tmp_path: Path) -> None:
    result = run(tmp_path / "bound", tmp_path, "--psnr-db", "20", "--search", "3")
    assert result.exit_code == 0, result.output
    assert float(result.output.partition("placements: ")[2].split()[0]) >= 20
    assert len(full_steps(tmp_path / "bound")) < 12


def test_coefficients_are_searched_by_their_own_fits(tmp_path: Path) -> None:
    result = run(tmp_path / "out", tmp_path, "--form", "coefficients", "--calls", "2", "--search", "2")
    assert result.exit_code == 0, result.output
    # Half of the runs judge: 24 calls in full. The others: 12 in full and 2 rounds of 1 + 2 calls; then 2 judge.
    assert "24 before the search, at most 80 for 2 placements of 2 full steps" in result.output
    assert "the best of 2 placements:" in result.output
    assert len(full_steps(tmp_path / "out")) == 2


def test_few_prompts_are_too_few_for_a_search_and_that_is_said(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path, 1)
    given = ["calibrate", "digits", "--prompts", prompts, "--out", str(tmp_path / "out"), "--steps", "6"]
    result = CliRunner().invoke(app, [*given, "--calls", "3", "--search", "2"])
    assert result.exit_code == 0, result.output
    assert "1 prompts are too few for a search" in result.output


def test_a_finer_target_is_reached_instead(tmp_path: Path) -> None:
    found = {}
    for target in ("plain", "finer"):
        result = run(tmp_path / target, tmp_path, "--target", target, "--calls", "4", "--search", "1")
        assert result.exit_code == 0, result.output
        found[target] = lesa.load_predictor(tmp_path / target)
    assert "240 before the search" in result.output, "48 plain ones and 192 finer ones"
    assert not torch.equal(found["plain"].coefficients, found["finer"].coefficients)  # type: ignore[union-attr]


def test_a_guided_pipeline_is_calibrated_for_its_guidance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline_source, "load_pipeline", lambda *_, **__: EmojiPipeline.load())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("HOURGLASS\nWHITE SQUARE\n")
    out = tmp_path / "out"
    given = ["calibrate", "emoji", "--prompts", str(prompts), "--out", str(out), "--steps", "8", "--batch", "2"]
    result = CliRunner().invoke(app, [*given, "--calls", "3", "--search", "4", "--set", "guidance_scale=2.5"])
    assert result.exit_code == 0, result.output
    predictor = lesa.load_predictor(out)
    assert isinstance(predictor, lesa.SolverPredictor)
    assert [each.scale for each in predictor.guidance] == pytest.approx([2.5] * 3, abs=1e-3)
    pipe = EmojiPipeline.load()
    use(result.output, pipe)
    pipe("HOURGLASS", num_inference_steps=8, guidance_scale=2.5, output_type="pt")
    assert (lesa.summary(pipe).full, lesa.summary(pipe).forecast) == (3, 5)


def test_a_second_run_takes_the_place_of_the_first(tmp_path: Path) -> None:
    for calls in ("4", "3"):
        assert run(tmp_path / "out", tmp_path, "--calls", calls, "--search", "0").exit_code == 0
    assert len(full_steps(tmp_path / "out")) == 3


@pytest.mark.usefixtures("_enough")
def test_five_lines_of_python_do_the_same(tmp_path: Path) -> None:
    assert run(tmp_path / "out", tmp_path, "--calls", "4", "--search", "24").exit_code == 0
    source = pipeline_source.PipelineSource(DigitsPipeline.load(), list("0123"), steps=12)
    fits = SolverFits(source, held_out=2, batch=4, progress=False)
    found = search_schedule(fits.psnr_db, even_schedules(source.sigmas, 4), placements=24, progress=False)
    fits.include_held_out()
    predictor = fits.fit(found.schedule, progress=False)
    told = lesa.load_predictor(tmp_path / "out")
    assert isinstance(told, lesa.SolverPredictor)
    assert predictor.full_steps == told.full_steps
    assert torch.equal(predictor.coefficients, told.coefficients)


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
    assert torch.equal(first.coefficients, second.coefficients)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--calls", "3", "--psnr-db", "20"], "give one budget: --calls or --psnr-db"),
        (["--psnr-db", "20", "--search", "0"], "--psnr-db needs a --search of at least 1"),
        (["--target", "finer", "--form", "coefficients"], "--target finer needs --form solver, got coefficients"),
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
    assert result.exit_code == 130 and "Interrupted: files that were written are whole" in result.output

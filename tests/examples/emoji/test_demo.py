"""The demo of the emoji model: the whole run at a small size, and what it finds ready."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: demo)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: demo)")
pytest.importorskip("skimage", reason="scikit-image is not installed (extra: demo)")

from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import lesa_kernels as lesa
from examples.emoji import demo, figures, prepare, prompts
from examples.emoji import emoji_model as emoji
from examples.emoji.__main__ import app
from examples.emoji.demo import DemoConfig, run_demo
from examples.emoji.emoji_pipeline import EmojiPipeline
from lesa_kernels.training.ranks import lock_folder

QUICK = {"samples": 2, "runs": 2, "calls": (8,), "converged_steps": 12}
WRITTEN = {".lock", "predictors", "images.png", "quality.png", "results.json"}
METHODS = {"learned solver", "LESA as published", "Spectrum", "TaylorSeer", "Adams-Bashforth 2", "Euler"}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a quick run, and `printed.txt`, what it printed."""
    folder: Path = tmp_path_factory.mktemp("demo")
    console = Console(width=80, record=True, file=io.StringIO())
    run_demo(DemoConfig(folder / "out", **QUICK), console)
    (folder / "printed.txt").write_text(console.export_text())
    return folder / "out"


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "results.json").read_text())
    return found


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_every_method_is_measured(results: dict[str, Any]) -> None:
    assert {row["method"] for row in results["rows"]} == METHODS
    assert results["plain"]["block_calls"] == 50 and results["plain"]["psnr"] is None
    for row in results["rows"]:
        assert row["block_calls"] == len(row["full_steps"]) == 8
        assert 5 < row["psnr"] < 60 and 0 < row["ssim"] < 1 and 5 < row["psnr_converged"] < 60
        assert row["psnr_error"] > 0 and row["seconds"] > 0
        assert row["speedup"] == pytest.approx(results["plain"]["seconds"] / row["seconds"])
    by_name = {row["method"]: row for row in results["rows"]}
    assert by_name["learned solver"]["full_steps"] == list(demo.PLACEMENTS[8])
    assert by_name["learned solver"]["psnr"] > by_name["Euler"]["psnr"]


def test_the_settings_are_written(results: dict[str, Any]) -> None:
    assert results["samples"] == 2 and results["prompts"] == list(prompts.SHOWN[:2])
    assert results["command"].startswith("python -m examples.emoji")
    assert results["clock"] == "processor time" and results["converged_steps"] == 12
    assert results["seconds"] > results["fit"]["seconds"] > 0
    assert set(results["machine"]) == {"device", "threads", "torch", "python"}
    assert results["fit"]["runs"] == 2 and results["fit"]["model_calls"] == 2 * (50 + 8)


def test_the_table_is_best_first_and_whole(out: Path, results: dict[str, Any]) -> None:
    printed = (out.parent / "printed.txt").read_text()
    lines = [line for line in printed.splitlines() if line.startswith((" 8  ", "50  "))]
    assert "…" not in printed and all(len(line.rstrip()) <= 80 for line in lines)
    assert lines[0].startswith("50  plain") and len(lines) == 1 + len(METHODS)
    order = sorted(results["rows"], key=lambda row: -row["psnr"])
    for line, row in zip(lines[1:], order, strict=True):
        assert line[4:].startswith(row["method"]) and f"{row['psnr']:.1f} ± " in line and f"{row['ssim']:.3f}" in line
    assert f"fitted: {2 * (50 + 8)} calls of the model" in printed and str(out / "images.png") in printed


def test_the_pictures_are_of_the_right_size(out: Path) -> None:
    assert names_in(out) == WRITTEN
    with Image.open(out / "images.png") as image:
        assert image.format == "PNG"
        # The labels, 2 emoji and their 2 distances; titles, the plain run, 6 methods and the license.
        assert image.size == (250 + 4 * 108 + 24, 72 + 7 * 108 + 36)
        image.load()
    with Image.open(out / "quality.png") as image:
        assert image.format == "PNG" and image.size == (840, 504)


def test_the_fitted_predictor_is_served(out: Path) -> None:
    pipe = EmojiPipeline.load()
    pipe.set_progress_bar_config(disable=True)
    with lesa.enabled(pipe, lesa.load_predictor(out / "predictors" / "8-calls")):
        pipe("octopus", generator=torch.Generator().manual_seed(0))
        assert lesa.summary(pipe).refused is None


def test_every_pixel_of_an_emoji_becomes_a_square(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    figures.draw_images(tmp_path / "images.png", "title", ["octopus", "ox"], images, [("same", images)])
    with Image.open(tmp_path / "images.png") as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        pixels = pixels.view(image.height, image.width, 3)
    large = emoji.to_pixels(images).repeat_interleave(3, 1).repeat_interleave(3, 2)
    for line in (0, 1):
        for column in (0, 1):
            top, left = 72 + 108 * line, 250 + 108 * column
            assert torch.equal(pixels[top : top + 96, left : left + 96], large[column])
    assert pixels[180:276, 250 + 216 + 24 :].min() == 255, "there is no distance"


def test_another_run_takes_the_place_of_the_first(out: Path, results: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "again"
    folder.mkdir()
    for name in ("images.png", "quality.png", "results.json"):
        (folder / name).write_bytes((out / name).read_bytes())
    run_demo(DemoConfig(folder, **{**QUICK, "samples": 1}), Console(quiet=True))
    assert json.loads((folder / "results.json").read_text())["samples"] == 1
    assert names_in(folder) == WRITTEN
    assert (folder / "images.png").read_bytes() != (out / "images.png").read_bytes()


def test_two_at_once_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmojiPipeline, "load", lambda *_: pytest.fail("nothing is to be sampled"))
    with lock_folder(tmp_path), pytest.raises(BlockingIOError, match="another process writes"):
        run_demo(DemoConfig(tmp_path), Console(quiet=True))


def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(EmojiPipeline, "load", lambda *_: pytest.fail("nothing is to be sampled"))
    with pytest.raises(NotADirectoryError, match="file/out"):
        run_demo(DemoConfig(tmp_path / "file" / "out"), Console(quiet=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "'--samples'"),
        (["--runs", "0"], "'--runs'"),
        (["--device", "tpu"], "got tpu"),
        (["--out", __file__], "is a file"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "out"), *options])
    assert result.exit_code == 2 and message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_missing_device_is_named(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    result = CliRunner().invoke(app, ["--device", "cuda", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "sees no CUDA device" in " ".join(result.output.replace("│", " ").split())


def test_calls_without_a_placement_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"calls must be of \[6, 8, 10\], got 7"):
        run_demo(DemoConfig(tmp_path, calls=(8, 7)), Console(quiet=True))


def interrupt_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is interrupted, as by Ctrl-C, once it was called so often."""
    done = 0

    def interrupted(*arguments: Any, **options: Any) -> Any:
        nonlocal done
        done += 1
        if done > calls:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return interrupted


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_measured", interrupt_after(3, demo._measured))
    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoConfig(tmp_path, **{**QUICK, "samples": 1}), Console(quiet=True))
    assert names_in(tmp_path) == {".lock"}
    with lock_folder(tmp_path):
        pass


def test_an_interrupted_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "run_demo", interrupt_after(0, run_demo))
    result = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert result.exit_code == 130 and "Interrupted" in result.output and "Traceback" not in result.output


def test_an_interrupted_picture_leaves_the_old_one(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def cut_short(figure: Figure, file: Path, **options: Any) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    old = (out / "images.png").read_bytes()
    (tmp_path / "images.png").write_bytes(old)
    monkeypatch.setattr(Figure, "savefig", cut_short)
    image = torch.zeros(1, 3, 32, 32)
    with pytest.raises(KeyboardInterrupt):
        figures.draw_images(tmp_path / "images.png", "title", ["ox"], image, [("same", image)])
    assert (tmp_path / "images.png").read_bytes() == old and names_in(tmp_path) == {"images.png"}


def test_nothing_is_learned_from_what_is_compared() -> None:
    compared, known = prompts.compared_prompts(400), prompts.known_prompts(400)
    assert len(set(compared)) == len(set(known)) == 400 and not set(compared) & set(known)
    assert set(prompts.SHOWN) <= set(compared[: len(prompts.SHOWN)])
    assert emoji.tokens_of([*compared, *known]).shape == (800, 8)


@pytest.mark.parametrize(("calls", "interval"), prepare.INTERVALS.items())
def test_committed_lesa_is_of_the_published_schedule(calls: int, interval: int) -> None:
    predictor = lesa.load_predictor(prepare.LESA / f"{calls}-calls")
    plan = predictor.plan(emoji.set_up(50))
    assert plan.full_steps == lesa.Schedule.interval(50, interval).full_steps and len(plan.full_steps) == calls


def test_folded_coefficients_forecast_what_lesa_does() -> None:
    predictor, sigmas, schedule = lesa.LesaPredictor(50), emoji.set_up(50), lesa.Schedule.interval(50, 10)
    full, same = predictor.plan(sigmas, schedule), prepare.folded(predictor, sigmas, schedule).plan(sigmas)
    sessions = lesa.Session(full), lesa.Session(same)
    torch.manual_seed(0)
    for step in range(50):
        if full.is_full(step):
            feature = torch.randn(2, 3, 4)
            for session in sessions:
                session.push(step, feature)
        else:
            forecasts = [session.forecast(step).clone() for session in sessions]
            torch.testing.assert_close(*forecasts)


def test_the_search_prints_a_placement() -> None:
    options = ["placements", "--calls", "2", "--search", "4", "--runs", "2", "--steps", "8"]
    result = CliRunner().invoke(prepare.app, options)
    assert result.exit_code == 0, result.output
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("2: (0, ") and line.endswith(" dB, 4 placements")


def test_lesa_is_trained_and_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "INTERVALS", {6: 22})
    result = CliRunner().invoke(prepare.app, ["lesa", "--out", str(tmp_path), "--runs", "1"])
    assert result.exit_code == 0, result.output
    assert isinstance(lesa.load_predictor(tmp_path / "6-calls"), lesa.LinearPredictor)

"""The comparison of qualities: every method runs, rows are kept and read back, targets are judged model by model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import pages
from benchmarks.quality import __main__ as quality
from benchmarks.quality import methods, tables
from benchmarks.quality.least_squares import fit_features
from benchmarks.quality.measures import psnr, ssim
from benchmarks.quality.setting import DATA, Samples, Setting
from examples.digits.model import SMALL_DIGITS, build_model, scheduler
from examples.digits.pipeline import DigitsPipeline
from examples.emoji.emoji_pipeline import EmojiPipeline
from lesa_kernels.predictors import Reuse, TaylorSeer
from lesa_kernels.schedule import Schedule

EFFORT = methods.Effort(placements=4, runs=2)
EVERYTHING = Schedule.explicit(12, range(12))


def _setting(name: str) -> Setting:
    torch.manual_seed(0)
    pipe: Any = EmojiPipeline.load()
    if name == "digits":
        pipe = DigitsPipeline(build_model(SMALL_DIGITS).eval(), scheduler())
    return Setting(Samples(DATA[name], pipe, 3, 0, 0, 12), Samples(DATA[name], pipe, 4, 100, 1, 12))


@pytest.mark.parametrize("name", ["digits", "emoji"])
def test_the_plain_images_are_what_the_model_samples(name: str) -> None:
    samples = _setting(name).unseen
    assert torch.equal(samples.forecast(Reuse(), EVERYTHING)[0], samples.plain)
    assert torch.allclose(samples.solved(EVERYTHING, 1), samples.plain, atol=1e-4)
    assert psnr(samples.converged, samples.plain)[0] > 15
    assert set(samples.prompts).isdisjoint(_setting(name).known.prompts) or name == "digits"


@pytest.mark.parametrize("name", ["digits", "emoji"])
def test_every_method_yields_rows_with_the_calls_that_were_asked_for(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "INTERVALS", {5: 4})
    # Spectrum's own rule gives no five calls in twelve steps.
    chosen = [each for each in methods.METHODS if not each.startswith("Spectrum")]
    if name == "emoji":
        # One of each way to sample.
        chosen = [methods.SOLVER, methods.NO_LOOKAHEAD, TAYLOR, methods.EULER, methods.L2P]
    rows: list[tables.Row] = []
    for row in quality.compare(DATA[name], 0, _setting(name), 5, rows, EFFORT, chosen):
        rows.append(row)
    found = {(row.method, row.schedule) for row in rows}
    assert len(found) == len(rows)
    assert {method for method, _ in found} == set(chosen)
    searched = {method for method in chosen if methods.METHODS[method].searched}
    assert {method for method, schedule in found if schedule == tables.BEST} == searched
    for row in rows:
        if methods.METHODS[row.method].kind != "trained":
            assert len(row.full_steps.split()) == 5, row
    # Another model takes the schedules that were found; none of it is made twice.
    others = [methods.SOLVER, methods.EULER]
    again = list(quality.compare(DATA[name], 1, _setting(name), 5, rows, EFFORT, others))
    best = {(row.method, row.full_steps) for row in rows if row.schedule == tables.BEST and row.method in others}
    assert {(row.method, row.full_steps) for row in again if row.schedule == tables.BEST} == best
    assert not list(quality.compare(DATA[name], 1, _setting(name), 5, [*rows, *again], EFFORT, others))


def test_a_searched_schedule_is_waited_for() -> None:
    found = list(quality.compare(DATA["digits"], 1, _setting("digits"), 5, [], EFFORT, [methods.EULER]))
    assert [row.schedule for row in found] == [tables.DEFAULT]


def test_measures() -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert ssim(images, images) == pytest.approx(1.0)
    assert ssim(images, images.flip(-1)) < 0.5
    assert ssim(images[:, 0], images[:, 0]) == pytest.approx(1.0)
    assert psnr(torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.2))[0] == pytest.approx(20.0)


STEPS = 12
SIGMAS = [1 - (step / STEPS) ** 1.3 for step in range(STEPS)] + [0.0]
SCHEDULE = Schedule.explicit(STEPS, (0, 3, 6, 9))


def _features() -> list[torch.Tensor]:
    return list(torch.randn(STEPS, 40, generator=torch.Generator().manual_seed(2)).cumsum(0))


@pytest.mark.parametrize("over_all", [False, True])
def test_least_squares_goes_on_from_its_own_forecasts(over_all: bool) -> None:
    found = fit_features(_features(), SIGMAS, SCHEDULE, window=2, over_all=over_all, ridge=0.0)
    known: dict[int, torch.Tensor] = {}
    for step, feature in enumerate(_features()):
        known[step] = feature.double()
        if step in SCHEDULE.full_steps:
            continue
        sources = found.sources(step)
        columns = torch.stack([*(known[source] for source in sources), torch.ones(40).double()], dim=1)
        best = torch.linalg.lstsq(columns, known[step][:, None], driver="gelsd").solution
        known[step] = (columns @ best)[:, 0]
        used = torch.cat([found.coefficients[step][-len(sources) :], found.offsets[step][None]])
        assert torch.allclose(columns @ used, known[step], atol=1e-4), step


def test_a_strong_ridge_gives_taylor() -> None:
    found = fit_features(_features(), SIGMAS, SCHEDULE, window=3, ridge=1e12)
    fitted, taylor = found.plan(SIGMAS), TaylorSeer(2).plan(SIGMAS, SCHEDULE)
    for got, want in zip(fitted.segments, taylor.segments, strict=True):
        own, other = got.launches[0], want.launches[0]
        for row, same in zip(own.output, other.output, strict=True):
            assert own.coefficients[row] == pytest.approx(other.coefficients[same], abs=1e-6)


def _row(method: str, seed: int, psnr: float, schedule: str = tables.DEFAULT) -> tables.Row:
    return tables.Row(
        "emoji", seed, 10, method, schedule, "0 1", psnr, 0.5, 0.9, psnr - 1, 8, "cpu", "2", "c", "d", "python"
    )


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = [_row(methods.BASHFORTH, 0, 40.0), _row(methods.SOLVER, 1, 39.0)]
    tables.save(rows, tmp_path / "rows.csv")
    assert tables.load(tmp_path / "rows.csv") == rows
    assert tables.load(tmp_path / "none.csv") == []


TAYLOR = "TaylorSeer 2, sigma"


def test_targets_compare_the_best_of_each_side_within_each_model() -> None:
    rows = [
        *(_row(methods.SOLVER, seed, 40.0 + seed, tables.BEST) for seed in (0, 1, 2)),
        *(_row(methods.SOLVER, seed, 30.0) for seed in (0, 1, 2)),
        *(_row(TAYLOR, seed, 35.0 + 2 * seed) for seed in (0, 1, 2)),
        *(_row("reuse", seed, 20.0) for seed in (0, 1, 2)),
        *(_row(methods.BASHFORTH, seed, 37.0, tables.BEST) for seed in (0, 1, 2)),
        *(_row(methods.SOLVER_FEW, seed, 38.0) for seed in (0, 1, 2)),
        *(_row(methods.SOLVER_MANY, seed, 40.0) for seed in (0, 1, 2)),
    ]
    found = tables.verdicts(rows)
    # The model that was searched on does not count at a searched schedule.
    assert [(verdict.cells[3], *verdict.cells[-2:]) for verdict in found] == [
        (f"{methods.SOLVER} / {TAYLOR}", "3.5 (3.0 to 4.0)", "met"),
        (f"{methods.SOLVER} / {methods.BASHFORTH}", "4.5 (4.0 to 5.0)", "met"),
        (f"{methods.SOLVER_FEW} / {methods.SOLVER_MANY}", "-2.0 (-2.0 to -2.0)", "NOT MET"),
    ]
    assert tables.verdict_table(found).row_count == 3
    page = tables.markdown(rows)
    assert f"| {methods.SOLVER} | 30.0 (30.0 to 30.0) | 41.5 (41.0 to 42.0) |" in page
    assert f"| {methods.BASHFORTH} |  | 37.0 (37.0 to 37.0) |" in page
    assert "| `lesa calibrate`: the learned solver | 41.5 |" in tables.readme_markdown(rows)


def test_the_tables_of_the_pages_are_those_of_the_committed_results() -> None:
    rows = tables.load(quality.HERE / "results.csv")
    for page, made in (("docs/quality.md", tables.markdown(rows)), ("README.md", tables.readme_markdown(rows))):
        text = (quality.ROOT / page).read_text(encoding="utf-8")
        assert text == pages.renewed(text, quality.COMMAND, made), f"run {quality.COMMAND}"


def test_a_report_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.save([_row(methods.SOLVER, 0, 40.0)], tmp_path / "rows.csv")
    (tmp_path / "page.md").write_text(f"before {pages.mark(quality.COMMAND)} old {pages.END} after")
    monkeypatch.setattr(quality, "compare", lambda *_: pytest.fail("measured"))
    plot = tmp_path / "plot.png"
    quality.main(models=tmp_path, out=tmp_path / "rows.csv", plot=plot, report=True, page=tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert f"| {methods.SOLVER} | 40.0 (40.0 to 40.0) |" in text and "old" not in text
    assert plot.read_bytes().startswith(b"\x89PNG")

"""The comparison of qualities: every method runs, rows are kept and read back, targets are judged model by model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import pages
from benchmarks.quality import __main__ as quality
from benchmarks.quality import methods, tables
from benchmarks.quality.least_squares import fit_features
from benchmarks.quality.setting import DATA, Setting
from examples.digits.model import SMALL_DIGITS, build_model, sample
from lesa_kernels.predictors import Reuse, TaylorSeer
from lesa_kernels.schedule import Schedule

EFFORT = methods.Effort(taylor=2, coefficients=3, runs=2)


def _setting() -> Setting:
    torch.manual_seed(0)
    return Setting(build_model(SMALL_DIGITS).eval(), SMALL_DIGITS, learn=2, samples=3, steps=12)


def test_the_reference_is_what_the_model_samples() -> None:
    setting = _setting()
    assert torch.allclose(
        setting.reference, sample(setting.model, setting.noise, setting.labels, num_steps=12), atol=1e-5
    )
    everything = Schedule.explicit(12, range(12))
    assert torch.equal(setting.images(Reuse(), everything)[0], setting.reference)
    assert torch.allclose(setting.solved(everything, 1), setting.reference, atol=1e-5)


def test_every_method_yields_rows_with_the_calls_that_were_asked_for() -> None:
    rows = quality.compare(DATA["digits"], 0, _setting(), 5, 4, EFFORT)
    found = {(row.method, row.schedule) for row in rows}
    assert {name for name, _ in found} >= {
        methods.LESA,
        methods.LESA_TUNED,
        methods.LESA_TAIL,
        methods.TAIL,
        methods.TAYLOR,
        methods.BASHFORTH,
        methods.EULER,
    }
    assert len(found) == len(rows)
    for row in rows:
        if row.schedule != methods.PUBLISHED:
            assert len(row.full_steps.split()) == 5, row


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


def _row(method: str, seed: int, psnr: float, schedule: str = methods.UNIFORM) -> tables.Row:
    return tables.Row(
        "digits", seed, 10, method, schedule, "0 1", psnr, 0.5, psnr - 1, 8, "cpu", "2", "c", "d", "python"
    )


def test_rows_survive_a_file(tmp_path: Path) -> None:
    rows = [_row(methods.TAIL, 0, 40.0), _row(methods.TAYLOR, 1, 39.0)]
    tables.save(rows, tmp_path / "rows.csv")
    assert tables.load(tmp_path / "rows.csv") == rows
    assert tables.load(tmp_path / "none.csv") == []


def test_targets_compare_within_each_model() -> None:
    rows = [
        *(_row(methods.TAIL, seed, 40.0 + seed) for seed in (0, 1)),
        *(_row(methods.TAYLOR, seed, 35.0 + 2 * seed) for seed in (0, 1)),
        *(_row(methods.BASHFORTH, seed, 36.0) for seed in (0, 1)),
        *(_row(methods.BASHFORTH, seed, 38.0, methods.OWN) for seed in (0, 1)),
    ]
    found = tables.verdicts(rows)
    assert [verdict.cells[-2:] for verdict in found] == [
        ("4.5 (4.0 to 5.0)", "met"),
        ("4.5 (4.0 to 5.0)", "NOT MET"),
        ("2.5 (2.0 to 3.0)", "NOT MET"),
    ]
    assert tables.verdict_table(found).row_count == 3
    page = tables.markdown(rows)
    assert f"| {methods.TAIL} | 40.5 (40.0 to 41.0) |" in page
    assert f"| {methods.BASHFORTH} | {methods.OWN} | 38.0 (38.0 to 38.0) |" in page


def test_the_tables_of_the_page_are_those_of_the_committed_results() -> None:
    text = (quality.ROOT / "docs/quality.md").read_text(encoding="utf-8")
    made = pages.renewed(text, quality.COMMAND, tables.markdown(tables.load(quality.HERE / "results.csv")))
    assert text == made, f"run {quality.COMMAND}"


def test_lines_hold_mean_and_spread() -> None:
    (line,) = tables.lines([_row(methods.TAIL, 0, 40.0), _row(methods.TAIL, 1, 43.0)])
    assert (line.psnr, line.lowest, line.highest, line.converged, line.models) == (41.5, 40.0, 43.0, 40.5, 2)


def test_a_report_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.save([_row(methods.TAIL, 0, 40.0)], tmp_path / "rows.csv")
    (tmp_path / "page.md").write_text(f"before {pages.mark(quality.COMMAND)} old {pages.END} after")
    monkeypatch.setattr(quality, "compare", lambda *_: pytest.fail("measured"))
    plot = tmp_path / "plot.png"
    quality.main(models=tmp_path, out=tmp_path / "rows.csv", plot=plot, report=True, page=tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert f"| {methods.TAIL} | 40.0 (40.0 to 40.0) |" in text and "old" not in text


def test_what_is_there_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [replace(_row(methods.TAIL, seed, 40.0), calls=calls) for seed in (0, 1, 2) for calls in (10, 8, 6)]
    tables.save(rows, tmp_path / "rows.csv")
    monkeypatch.setattr(quality, "compare", lambda *_: pytest.fail("measured again"))
    quality.main(data=["digits"], models=tmp_path, out=tmp_path / "rows.csv", plot=tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")

"""The comparison of histories: every case with every dtype, memory that falls, a table on a page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import history, pages
from benchmarks.quality.setting import DATA, Samples, Setting
from examples.digits.model import SMALL_DIGITS, build_model, scheduler
from examples.digits.pipeline import DigitsPipeline
from lesa_kernels.integrations import LesaWarning
from lesa_kernels.predictors import LinearPredictor
from lesa_kernels.schedule import Schedule
from lesa_kernels.training import TrainingConfig

METHODS = ("TaylorSeer 2, sigma", "coefficients through the tail", "LESA, tuned")


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> Setting:
    """A small model without training; what takes long to fit is replaced."""
    monkeypatch.setattr(history, "fit", lambda source, *_, **__: LinearPredictor(source.sigmas, [0]))
    torch.manual_seed(0)
    pipe = DigitsPipeline(build_model(SMALL_DIGITS).eval(), scheduler())
    return Setting(Samples(DATA["digits"], pipe, 2, 0, 0, 12), Samples(DATA["digits"], pipe, 2, 100, 1, 12))


def test_a_smaller_dtype_takes_less_memory(setting: Setting) -> None:
    found = list(history.cases(setting, 5, TrainingConfig(1, 1)))
    assert [(case.method, case.chunk) for case in found] == [
        (method, chunk) for chunk in (None, 1) for method in METHODS
    ]
    for case in (found[0], found[-1]):
        line = history.measure(setting.unseen, case)
        sizes = dict(zip(history.DTYPES, (size for _, size in line.found), strict=True))
        assert sizes[torch.float32] == 2 * sizes[torch.float16] == 2 * sizes[torch.bfloat16]
        assert all(quality > 30 for quality, _ in line.found)


def test_a_run_without_forecasts_is_no_result(setting: Setting) -> None:
    case = replace(next(history.cases(setting, 5, TrainingConfig(1, 0))), schedule=Schedule.explicit(11, [0]))
    with (
        pytest.warns(LesaWarning),
        pytest.raises(RuntimeError, match="TaylorSeer 2, sigma with a history of"),
    ):
        history.measure(setting.unseen, case)


def test_the_table_goes_to_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: Setting) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before {pages.mark(history.COMMAND)} old {pages.END} after")
    case = next(history.cases(setting, 5, TrainingConfig(1, 0)))
    monkeypatch.setattr(history, "cases", lambda _: [case])
    monkeypatch.setattr(history, "measure", lambda _, each: history.Line(each, ((40.0, 2**20),) * 3))
    history.main(samples=2, page=page)
    text = page.read_text()
    assert "old" not in text and text.count("| 40.00 dB, 1.0 MiB") == 3
    assert "| TaylorSeer 2, sigma | uniform in sigma | a segment | 40.00 dB, 1.0 MiB |" in text

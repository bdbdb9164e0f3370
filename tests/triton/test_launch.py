"""Which compiled kernel a launch takes, and that none is loaded while a graph is captured."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from op_inputs import offset, valid_arguments
from torch import Tensor
from triton_engines import driver, kernels, simulator

from lesa_kernels.ops import OPS

N = 64
# Kept, because the deletion of a kernel needs the driver, which is gone after a test.
_packages: list[ModuleType] = []


@pytest.fixture
def lesa() -> Iterator[ModuleType]:
    """The package of launchers, none of whose kernels is loaded."""
    with simulator():
        _packages.append(kernels.__wrapped__(interpreted=False))
        yield _packages[-1]


@pytest.mark.parametrize("op", OPS)
def test_a_first_call_in_a_capture_says_what_to_do(lesa: ModuleType, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call = partial(getattr(lesa, op), *valid_arguments(torch.float32, grad=False, feature=(N,))[op])
    monkeypatch.setattr(lesa.launch, "is_capturing", lambda: True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"^lesa::{op}: .* call the op once with the same arguments first$"):
            call()
    assert driver().launches == []
    monkeypatch.setattr(lesa.launch, "is_capturing", lambda: False)
    call()
    monkeypatch.setattr(lesa.launch, "is_capturing", lambda: True)
    before = len(driver().launches)
    call()
    assert len(driver().launches) == 2 * before


def _parameters(kind: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Coefficients [M, K] and offsets [M] of all strides that matter."""
    for rows, count in ((1, 1), (1, 3), (2, 1), (2, 3), (9, 3)):
        yield torch.ones(rows, count, dtype=kind), torch.ones(rows)
        yield torch.ones(rows, count, dtype=kind), torch.ones(rows, dtype=kind)
        yield torch.ones(count, rows, dtype=kind).t(), torch.ones(2 * rows, dtype=kind)[::2]
        yield offset((rows, count), kind), torch.ones(5 * rows, dtype=kind)[::5]


def _call_all(lesa: ModuleType, dtype: torch.dtype, kind: torch.dtype, size: int) -> None:
    for matrix, offsets in _parameters(kind):
        rows, count = matrix.shape
        history, ring = torch.ones(count, size, dtype=dtype).unbind(), torch.ones(rows + count, size, dtype=dtype)
        lesa.predict(history, matrix[0], offsets[:1], torch.ones((), dtype=dtype))
        lesa.predict(history, matrix[-1], offsets[:1], torch.ones(()))
        lesa.forecast(history, matrix, offsets)
        for each in (ring, torch.ones(rows + count, 2, size, dtype=dtype)[:, 1]):
            lesa.forecast_into(each, matrix, offsets, range(count), range(count, count + rows))
        if rows == count == 1:
            lesa.forecast_into(ring[:1].as_strided((1, size), (0, 1)), matrix, offsets, [0], [0])
        lesa.push(ring, history[0].to(kind), 1)


def test_a_known_launch_takes_the_kernel_that_triton_would_choose(
    lesa: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, direct = lesa.launch.launch, []

    def compare(op: str, kernel: Any, programs: int, arguments: Any, options: Any, key: Any = None) -> None:
        known = lesa.launch._compiled.get(key)
        if known is not None:
            direct.append(op)
            assert known is kernel.warmup(*arguments, grid=(programs,), **options)
        launch(op, kernel, programs, arguments, options, key)

    monkeypatch.setitem(lesa.forecast.__globals__, "launch", compare)
    monkeypatch.setattr(driver(), "launcher_cls", lambda source, metadata: lambda *arguments: None)
    for dtype, kind in (
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float32),
    ):
        for size in (64, 16):  # the kernels of one size serve the other
            _call_all(lesa, dtype, kind, size)
    assert set(direct) == {"predict", "forecast", "forecast_into", "push"}

"""Lists what the kernels should reach on a GPU, written down before it was measured, beside the rows of results.csv.

`python -m benchmarks.predictions` writes the table of docs/gpu.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cases import SIZES
from benchmarks.harness import CAPTURED
from benchmarks.pages import renewed
from benchmarks.suite import FLUX

COMMAND = "python -m benchmarks.predictions"
PAGE = Path(__file__).parents[1] / "docs/gpu.md"
COPIES = {"NVIDIA H200": 4.3e12, "NVIDIA H100 80GB HBM3": 3.35e12}
"""GPUs -> bytes a second that a copy moves, both directions counted: measured on an H200; an H100's data sheet."""


@dataclass(frozen=True)
class Prediction:
    """The share of a copy that a kernel reaches.

    Args:
        device: as torch names it.
        op: of the case.
        size: of the case.
        variant: which.
        moved_bytes: of the case.
        low: share of a copy of as many bytes, at least.
        high: and at most.
        issue_us: microseconds that the instructions alone take, where these are what limits it.
    """

    device: str
    op: str
    size: str
    variant: str
    moved_bytes: int
    low: float
    high: float
    issue_us: float | None = None

    @property
    def microseconds(self) -> tuple[float, float]:
        """The time at the high and at the low share."""
        copy = 1e6 * self.moved_bytes / COPIES[self.device]
        return copy / self.high, copy / self.low


# Op, what follows the size's name, features read and written; GPU -> the shares, and the issue slots' microseconds.
_Gpus = dict[str, tuple[float, float, float | None]]
_SHARES: tuple[tuple[str, str, int, _Gpus], ...] = (
    ("predict", "K=8", 9, {"H200": (0.95, 1.05, None), "H100": (0.95, 1.05, None)}),
    ("forecast", "K=8, M=6", 14, {"H200": (0.90, 1.00, None), "H100": (0.93, 1.00, None)}),
    ("predict_l1", "K=8", 9, {"H200": (0.85, 0.92, None), "H100": (0.90, 0.95, None)}),
    # The gradient is read twice, which a copy of as many bytes as are needed does not do.
    ("predict_backward", "K=8", 17, {"H200": (0.85, 0.90, None), "H100": (0.85, 0.90, None)}),
    ("gram", "K=9", 9, {"H200": (0.70, 0.85, 36.0), "H100": (0.82, 0.92, 36.0)}),
    ("gram", "K=16", 16, {"H200": (0.55, 0.65, 83.0), "H100": (0.60, 0.80, 83.0)}),
)


def predictions() -> Iterator[Prediction]:
    """Yield what is predicted for FLUX's features in bfloat16, captured: no launch takes part in it."""
    for op, detail, features, gpus in _SHARES:
        moved = features * math.prod(SIZES[FLUX]) * torch.bfloat16.itemsize
        for device in COPIES:
            for gpu, shares in gpus.items():
                if gpu in device:
                    size = f"{FLUX}, {detail}, bfloat16"
                    yield Prediction(device, op, size, f"lesa::{op}{CAPTURED}", moved, *shares)


def markdown() -> str:
    """Lay out all predictions as a table, one a line."""
    lines = [
        "| GPU | op | MB | us of a copy | share of a copy | us | us of its instructions |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in predictions():
        (fast, slow), copy = one.microseconds, 1e6 * one.moved_bytes / COPIES[one.device]
        issue = "" if one.issue_us is None else f"{one.issue_us:.0f}"
        cells = [
            one.device.removeprefix("NVIDIA "),
            f"`{one.op}`, {one.size.removeprefix(FLUX + ', ').removesuffix(', bfloat16')}",
            f"{one.moved_bytes / 1e6:.0f}",
            f"{copy:.0f}",
            f"{one.low:.2f} to {one.high:.2f}",
            f"{fast:.0f} to {slow:.0f}",
            issue,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), COMMAND, markdown()), encoding="utf-8")

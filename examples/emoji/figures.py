"""Writes the demo's results: a table, a JSON file, the pictures side by side, and quality over calls."""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from examples.emoji.emoji_model import to_pixels
from lesa_kernels.files import replacing
from lesa_kernels.machine import device_name

CREDIT = (
    "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0. "
    "Drawn by a model that was trained on them."
)
BEST = "learned solver"
"""The method that is set off: the best that this package has."""

# Pixels of the picture: of a pixel of an emoji, and the space between emoji, beside and above them.
_SCALE, _GAP, _LABELS, _TITLES, _FOOT = 3, 12, 250, 72, 36
_DPI, _TEXT, _GAIN = 100, 13, 4


@dataclass(frozen=True)
class Row:
    """One measured method.

    Args:
        method: its name.
        schedule: what its placement of the full steps is called.
        full_steps: the steps on which the blocks ran.
        block_calls: how many, counted.
        seconds: of the whole run.
        speedup: how many times less than the plain run took.
        psnr: dB against the plain run's image, mean over samples; None for the plain run.
        psnr_error: its standard error.
        ssim: structural similarity to the plain run's image, mean over samples.
        psnr_converged: dB against the image of a converged run.
    """

    method: str
    schedule: str
    full_steps: tuple[int, ...]
    block_calls: int
    seconds: float
    speedup: float
    psnr: float | None
    psnr_error: float | None
    ssim: float | None
    psnr_converged: float


def best_first(rows: Sequence[Row], calls: int) -> list[Row]:
    """Return the methods with so many calls, best first."""
    return sorted((row for row in rows if row.block_calls == calls), key=lambda row: -(row.psnr or 0.0))


def table(rows: Sequence[Row], plain: Row, samples: int) -> Table:
    """Lay the rows out for 80 columns: a section for each number of calls, best first."""
    out = Table(
        title=f"{samples} unseen samples against the plain run of {plain.block_calls} calls",
        caption="converged: dB against a far finer run; s: seconds of a run of all samples",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("calls and method", "placement", "PSNR, dB", "SSIM", "converged", "s", ""):
        left = name in ("calls and method", "placement")
        out.add_column(name, justify="left" if left else "right", no_wrap=True)
    out.add_row(
        f"[bold]{plain.block_calls}[/]  {plain.method}",
        plain.schedule,
        "",
        "",
        f"{plain.psnr_converged:.1f}",
        f"{plain.seconds:.2f}",
        "1.0x",
    )
    for calls in sorted({row.block_calls for row in rows}, reverse=True):
        out.add_section()
        for row in best_first(rows, calls):
            out.add_row(
                f"[bold]{calls:2d}[/]  {row.method}",
                row.schedule,
                f"{row.psnr:.1f} ± {row.psnr_error:.1f}",
                f"{row.ssim:.3f}",
                f"{row.psnr_converged:.1f}",
                f"{row.seconds:.2f}",
                f"{row.speedup:.1f}x",
                style="bold" if row.method == BEST else "",
            )
    return out


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine that the figures were measured on."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def write_json(path: Path, rows: Sequence[Row], plain: Row, settings: Mapping[str, Any]) -> None:
    """Write all figures with the settings that they were measured with."""
    content = {**settings, "plain": asdict(plain), "rows": [asdict(row) for row in rows]}
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw_images(
    path: Path, title: str, prompts: Sequence[str], plain: Tensor, lines: Sequence[tuple[str, Tensor]]
) -> None:
    """Draw samples as large, sharp pixels: a line the plain run, a line a method, a column a prompt.

    Beside them is how far each pixel is from the plain run's, as ink, four times as strong.

    Args:
        path: the PNG to write.
        title: above everything.
        prompts: of the columns.
        plain: [B, 3, 32, 32], the plain run's images of the prompts, -1 to 1.
        lines: of each method its label and its images, [B, 3, 32, 32].
    """
    from matplotlib.figure import Figure

    columns = len(prompts)
    seen = plain.clamp(-1, 1)
    distances = [(images.clamp(-1, 1) - seen).abs().mean(1, keepdim=True).expand_as(seen) for _, images in lines]
    cell = _SCALE * plain.shape[-1] + _GAP
    width = _LABELS + 2 * columns * cell + 2 * _GAP
    height = _TITLES + (1 + len(lines)) * cell + _FOOT
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)

    def write(x: float, y: float, text: str, align: str = "center", **style: Any) -> None:
        style = {"fontsize": _TEXT, "linespacing": 1.25, **style}
        figure.text(x / width, 1 - y / height, text, ha=align, va="center", **style)

    write(_GAP, _TITLES / 2, title, "left", weight="bold")
    for column, prompt in enumerate(prompts):
        x = _LABELS + column * cell + (cell - _GAP) / 2
        write(x, _TITLES / 2, textwrap.fill(prompt.lower(), 10))
    write(_LABELS + 1.5 * columns * cell + _GAP, _TITLES / 2, f"distance from the plain run, {_GAIN} x")
    for line, (label, images) in enumerate([("plain run", plain), *lines]):
        y = _TITLES + line * cell
        write(_GAP, y + (cell - _GAP) / 2, label, "left")
        for column in range(columns):
            _put(figure, images[column], _LABELS + column * cell, height - y)
            if line:
                x = _LABELS + (columns + column) * cell + 2 * _GAP
                _put(figure, 1 - _GAIN * distances[line - 1][column], x, height - y)
    write(_GAP, height - _FOOT / 2, CREDIT, "left", fontsize=9, color="dimgray")
    with replacing(path) as file:
        figure.savefig(file, dpi=_DPI, pil_kwargs={"optimize": True})


def _put(figure: Any, image: Tensor, left: float, top: float) -> None:
    """Put an image [3, 32, 32] into a figure, each of its pixels a square of whole pixels."""
    pixels = to_pixels(image[None])[0].numpy().repeat(_SCALE, 0).repeat(_SCALE, 1)
    figure.figimage(pixels, left, top - len(pixels), origin="upper")


def draw_quality(path: Path, rows: Sequence[Row]) -> None:
    """Draw PSNR against calls of the blocks, a line a method."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    most = max(row.block_calls for row in rows)
    for number, name in enumerate(row.method for row in best_first(rows, most)):
        points = sorted((row.block_calls, row.psnr) for row in rows if row.method == name)
        width = 2.5 if name == BEST else 1.2
        axes.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=name, linewidth=width)
    axes.set(xlabel="calls of the blocks, of 50 steps", ylabel="PSNR against the plain run, dB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, title="best first")
    with replacing(path) as file:
        figure.savefig(file, dpi=120)

"""Writes the demo's results: a table, a JSON file, the images side by side, and quality against calls."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from examples.digits.comparison import PUBLISHED, UNIFORM, WARM_UNIFORM
from lesa_kernels.files import replacing
from lesa_kernels.machine import device_name


@dataclass(frozen=True)
class Row:
    """One measured method.

    Args:
        method: its name.
        schedule: what the schedule is called.
        full_steps: the steps on which the blocks ran.
        block_calls: how many, counted.
        seconds: wall clock of the whole run.
        psnr: dB against the 50-step sample from the same noise, mean over samples.
        psnr_error: its standard error.
        psnr_converged: dB against the converged sample.
        feature_error: relative L2 error of the forecast features, None for solvers.
    """

    method: str
    schedule: str
    full_steps: tuple[int, ...]
    block_calls: int
    seconds: float
    psnr: float
    psnr_error: float
    psnr_converged: float
    feature_error: float | None


def table(rows: Sequence[Row], reference: Row, samples: int) -> Table:
    """Lay the rows out for 80 columns: a section for each number of block calls, best first."""
    out = Table(
        title=f"{samples} unseen samples, PSNR against their {reference.block_calls}-step samples",
        caption="AB2: two-step Adams-Bashforth. error: of the forecast features, relative",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("block calls and method", "full steps", "seconds", "", "PSNR, dB", "error"):
        out.add_column(
            name, justify="left" if name in ("block calls and method", "full steps") else "right", no_wrap=True
        )
    seconds = f"{reference.seconds:.2f}"
    out.add_row(f"[bold]{reference.block_calls}[/]  {reference.method}", "every step", seconds, "1.0x", "", "")
    for calls in sorted({row.block_calls for row in rows}, reverse=True):
        out.add_section()
        for row in sorted((row for row in rows if row.block_calls == calls), key=lambda row: -row.psnr):
            out.add_row(
                f"[bold]{calls:2d}[/]  {row.method}",
                row.schedule,
                f"{row.seconds:.2f}",
                f"{reference.seconds / row.seconds:.1f}x",
                f"{row.psnr:.1f} ± {row.psnr_error:.1f}",
                "" if row.feature_error is None else f"{row.feature_error:.3f}",
                style="bold" if row.method == "LESA" else "",
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


def write_json(path: Path, rows: Sequence[Row], reference: Row, settings: dict[str, Any]) -> None:
    """Write all figures with the settings that they were measured with."""
    plain = {**asdict(reference), "psnr": None, "psnr_error": None}  # against itself
    content = {**settings, "reference": plain, "rows": [asdict(row) for row in rows]}
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n")


def draw_images(path: Path, images: dict[str, dict[int, tuple[Tensor, Row]]], reference: Tensor) -> None:
    """Draw ten samples, one of each class, a line a method, and beside them how far each lies from the 50-step sample.

    Args:
        path: the PNG to write.
        images: label -> block calls -> (images [B, 28, 28], its row); there is a panel for each count that occurs.
        reference: [B, 28, 28].
    """
    from matplotlib.figure import Figure

    counts = sorted({count for lines in images.values() for count in lines}, reverse=True)
    cell, labels, height = 0.36, 2.3, len(images) + 1
    figure = Figure(figsize=(labels + 21 * cell, len(counts) * (height * cell + 0.7)), layout="constrained")
    panels = figure.subplots(len(counts), 1, squeeze=False)[:, 0]
    for panel, count in zip(panels, counts, strict=True):
        lines = [("all 50 calls", reference)]
        for label, by_count in images.items():
            if count in by_count:
                picture, row = by_count[count]
                lines.append((f"{label}: {row.psnr:.1f} dB", picture))
        sheet = torch.cat([_line(picture[:10], reference[:10]) for _, picture in lines])
        panel.imshow(sheet.numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        size = reference.shape[-1]
        panel.set_yticks([size * (index + 0.5) for index in range(len(lines))], [label for label, _ in lines])
        panel.tick_params(labelsize=8, length=0)
        for index in range(1, len(lines)):
            panel.axhline(size * index - 0.5, color="black", linewidth=0.6)
        panel.set_xticks([size * 5, size * 16], ["samples", "error, 3 x"])
        panel.set_title(f"{count} calls of the blocks instead of 50", fontsize=10)
    with replacing(path) as file:
        figure.savefig(file, dpi=90)


def _line(images: Tensor, reference: Tensor) -> Tensor:
    """Put ink on white: ten images side by side, a gap, and three times their distance from the reference."""
    images, reference = images.clamp(-1, 1), reference.clamp(-1, 1)
    size = images.shape[-1]
    ink = torch.cat([*((images + 1) / 2), torch.zeros(size, size), *(1.5 * (images - reference).abs())], dim=1)
    return 1 - ink.clamp(0, 1)


def draw_quality(path: Path, rows: Sequence[Row]) -> None:
    """Draw PSNR against calls of the blocks: a line a method; LESA's own schedule stands with the uniform one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    names = sorted({row.method for row in rows})
    for panel, names_of_schedules in zip(panels, ((PUBLISHED,), (UNIFORM, WARM_UNIFORM)), strict=True):
        for index, name in enumerate(names):
            points = sorted(
                (row.block_calls, row.psnr) for row in rows if row.method == name and row.schedule in names_of_schedules
            )
            style = {"linewidth": 2.5, "zorder": 3} if name == "LESA" else {"linewidth": 1.2}
            panel.plot(*zip(*points, strict=True), marker="o", color=f"C{index}", label=name, **style)
        panel.set(title=names_of_schedules[0], xlabel="calls of the blocks (of 50 steps)")
        panel.grid(alpha=0.3)
    panels[1].set_title(f"{UNIFORM} (LESA: {WARM_UNIFORM})")
    panels[0].set_ylabel("PSNR against the 50-step sample, dB")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), fontsize=8)
    with replacing(path) as file:
        figure.savefig(file, dpi=120)

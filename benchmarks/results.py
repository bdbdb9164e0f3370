"""Reads, writes and shows the rows of the results, with the machine and commit of each."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table

from lesa_kernels.files import replacing
from lesa_kernels.machine import device_name

RESULTS = Path(__file__).parent / "results.csv"
"""The committed results."""

PEAKS = {"NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA H200": 4.8e12, "NVIDIA A100-SXM4-80GB": 2.039e12}
"""GPUs as torch names them -> bytes a second of their memory, by the data sheet."""


class Origin(NamedTuple):
    """What all rows of a run share."""

    device: str
    threads: int
    torch: str
    cuda: str
    commit: str
    date: str
    command: str


@dataclass(frozen=True)
class Measurement:
    """One row of the results. Seconds are per call; None where a number has no meaning or is not known.

    Args:
        op: the case's.
        size: the case's.
        variant: who computed it.
        median_s: of the samples.
        p20_s: their 20 % quantile.
        p80_s: their 80 % quantile.
        gb_per_s: the bytes that must be moved at least, per second.
        share_of_copy: time that a copy of as many bytes took in the same run, captured or not, divided by this one.
        extra_bytes: peak memory of a call beyond its inputs, what it returns included.
        device: name of the processor or GPU.
        threads: of the host.
        torch: version.
        cuda: version that torch was built with, empty for none.
        commit: of this repository.
        date: of the run.
        command: that made it.
        share_of_peak: of the data sheet's bandwidth; None where it is not in `PEAKS`.
        host_no_grad_us: microseconds that the host takes to launch a call under `torch.no_grad`; None on the CPU.
        host_inference_us: the same under `torch.inference_mode`.
    """

    op: str
    size: str
    variant: str
    median_s: float
    p20_s: float
    p80_s: float
    gb_per_s: float | None
    share_of_copy: float | None
    extra_bytes: int | None
    device: str
    threads: int
    torch: str
    cuda: str
    commit: str
    date: str
    command: str
    share_of_peak: float | None = None
    host_no_grad_us: float | None = None
    host_inference_us: float | None = None


COLUMNS = [field.name for field in fields(Measurement)]


def origin(device: torch.device, module: str = "benchmarks") -> Origin:
    """Return where and how this process measures, as a command of a module."""
    return Origin(
        device=device_name(device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        commit=commit(),
        date=datetime.now(timezone.utc).date().isoformat(),
        command=" ".join([f"python -m {module}", *sys.argv[1:]]),
    )


def commit(folder: Path = RESULTS.parent) -> str:
    """Return what git calls the working tree that holds a folder; "unknown" outside of a repository.

    Results that an earlier run appended do not make it dirty.
    """
    described = ["describe", "--always"]
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ":/", f":(exclude){RESULTS.name}"]
    try:
        name, changes = (
            subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, check=False).stdout
            for command in (described, changed)
        )
    except FileNotFoundError:
        return "unknown"
    return name.strip() + ("-dirty" if changes.strip() else "") or "unknown"


def table(rows: Sequence[Measurement]) -> Table:
    """Lay out the rows of one case; `x ours` is the time as a multiple of the first row's."""
    out = Table(title=f"{rows[0].op} at {rows[0].size}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    on_gpu = any(row.host_inference_us or row.host_no_grad_us or row.share_of_peak for row in rows)
    further = ("of peak", "host us", "no_grad") if on_gpu else ()
    out.add_column("variant")
    for name in ("median ms", "p20", "p80", "GB/s", "of copy", "x ours", "extra MB", *further):
        out.add_column(name, justify="right", no_wrap=True)
    own = rows[0].median_s
    for row in rows:
        digits = 2 if own >= 1e-3 else 4
        numbers = (f"{1e3 * value:.{digits}f}" for value in (row.median_s, row.p20_s, row.p80_s))
        out.add_row(
            row.variant,
            *numbers,
            _shown(row.gb_per_s, 1),
            _shown(row.share_of_copy, 0, 100, " %"),
            f"{row.median_s / own:.2f}",
            _shown(row.extra_bytes, 1, 1e-6),
            *(
                (
                    _shown(row.share_of_peak, 0, 100, " %"),
                    _shown(row.host_inference_us, 1),
                    _shown(row.host_no_grad_us, 1),
                )
                if on_gpu
                else ()
            ),
        )
    return out


def _shown(value: float | None, digits: int, times: float = 1, unit: str = "") -> str:
    return "" if value is None else f"{times * value:.{digits}f}{unit}"


def save(rows: Sequence[Measurement], path: Path) -> None:
    """Append rows to a CSV file; rows that an older version wrote are kept, with empty cells in newer columns.

    Raises:
        ValueError: when the file has a column that rows do not have any more.
    """
    header: Sequence[str] = ()
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            header, old = reader.fieldnames or (), list(reader)
        if strange := set(header) - set(COLUMNS):
            raise ValueError(f"{path} must have no column but {', '.join(COLUMNS)}, got {', '.join(sorted(strange))}")
    if header and header != COLUMNS:
        with replacing(path) as unfinished:
            _write(old, unfinished, "w")
    # Another run may append at the same time.
    _write([asdict(row) for row in rows], path, "a" if header else "w")


def _write(rows: Sequence[dict[str, Any]], path: Path, mode: str) -> None:
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, restval="")
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)


def load(path: Path) -> list[Measurement]:
    """Read the rows of a CSV file that `save` wrote."""
    with path.open(newline="") as file:
        return [_parsed(row) for row in csv.DictReader(file)]


def _parsed(row: dict[str, str]) -> Measurement:
    values: dict[str, Any] = {name: row.get(name, "") for name in COLUMNS}  # older versions lack the newer columns
    may_lack = ("gb_per_s", "share_of_copy", "share_of_peak", "host_no_grad_us", "host_inference_us")
    values |= {name: float(row[name]) for name in ("median_s", "p20_s", "p80_s")}
    values |= {name: float(values[name]) if values[name] else None for name in may_lack}
    extra = values["extra_bytes"]
    return Measurement(**{**values, "threads": int(row["threads"]), "extra_bytes": int(extra) if extra else None})

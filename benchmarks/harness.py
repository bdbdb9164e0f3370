"""Measuring: a correctness gate, variants interleaved in one process, cold caches, quantiles, share of a copy."""

from __future__ import annotations

import csv
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich import box
from rich.table import Table
from torch import Tensor

COPY = "copy of the same bytes"


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Args:
        name: what it is called.
        run: computes the outputs of input set i, a list of tensors.
        checked: whether its outputs must match the reference (a copy's need not).
    """

    name: str
    run: Callable[[int], Sequence[Tensor]]
    checked: bool = True


@dataclass(frozen=True)
class Case:
    """What is measured: an op at a size.

    Args:
        op: name of the op.
        size: name of the size.
        moved_bytes: bytes that must be read and written at least.
        reference: the outputs of input set 0, in float64 or float32.
        tolerance: largest allowed error relative to the largest magnitude of an output.
        variants: to be timed, the copy among them.
    """

    op: str
    size: str
    moved_bytes: int
    reference: Sequence[Tensor]
    tolerance: float
    variants: Sequence[Variant]


@dataclass(frozen=True)
class Measurement:
    """One row of the results; seconds are wall clock."""

    op: str
    size: str
    variant: str
    median_s: float
    p20_s: float
    p80_s: float
    gb_per_s: float
    share_of_copy: float
    device: str
    threads: int
    torch: str
    commit: str
    date: str
    command: str


def last_level_cache() -> int:
    """Bytes of the CPU's last-level cache; 32 MiB where the system does not tell."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if match:
            sizes.append(int(match[1]) * (2**10 if match[2] == "K" else 2**20))
    return max(sizes, default=32 * 2**20)


def sets_needed(bytes_per_set: int) -> int:
    """How many input sets to rotate through, so that each is cold when its turn comes."""
    return max(2, min(64, -(-4 * last_level_cache() // max(bytes_per_set, 1))))


def check(case: Case) -> None:
    """Refuse to time a wrong result.

    Raises:
        ValueError: names the variant and its error.
    """
    for variant in case.variants:
        if not variant.checked:
            continue
        for got, want in zip(variant.run(0), case.reference, strict=True):
            error = ((got.double() - want.double()).abs().max() / want.abs().max().double()).item()
            if not error <= case.tolerance:
                raise ValueError(
                    f"{case.op} at {case.size}: {variant.name} must be within {case.tolerance} of the reference, "
                    f"got {error:.2e}"
                )


def measure(case: Case, repeats: int, command: str) -> list[Measurement]:
    """Check a case, then time its variants in turn.

    Args:
        case: what to measure.
        repeats: rounds; each runs every variant once, in a rotating order.
        command: recorded with each row.

    Returns:
        One row a variant.

    Raises:
        ValueError: when a variant computes something else than the reference.
    """
    check(case)
    times: dict[str, list[float]] = {variant.name: [] for variant in case.variants}
    for turn in range(repeats + 1):
        order = [*case.variants[turn % len(case.variants) :], *case.variants[: turn % len(case.variants)]]
        for variant in order:
            begin = time.perf_counter()
            result = variant.run(turn)
            elapsed = time.perf_counter() - begin
            # Freed outside of the clock: returning pages to the system is not the op's work.
            del result
            if turn:
                times[variant.name].append(elapsed)
    copy = statistics.median(times[COPY])
    return [_row(case, name, values, copy, command) for name, values in times.items()]


def _row(case: Case, name: str, values: list[float], copy: float, command: str) -> Measurement:
    ordered = sorted(values)
    median = statistics.median(values)
    return Measurement(
        op=case.op,
        size=case.size,
        variant=name,
        median_s=median,
        p20_s=ordered[int(0.2 * (len(ordered) - 1))],
        p80_s=ordered[-(-8 * (len(ordered) - 1) // 10)],
        gb_per_s=case.moved_bytes / median / 1e9,
        share_of_copy=copy / median,
        device=_device(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        commit=_commit(),
        date=datetime.now(timezone.utc).date().isoformat(),
        command=command,
    )


def _device() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return found.group(1) if found else platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "unknown"


def table(rows: Sequence[Measurement]) -> Table:
    """Lay out the rows of one case; the last column is the time as a multiple of the first row's."""
    out = Table(title=f"{rows[0].op} at {rows[0].size}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("variant", no_wrap=True)
    for name in ("median ms", "p20", "p80", "GB/s", "of copy", "x ours"):
        out.add_column(name, justify="right", no_wrap=True)
    own = rows[0].median_s
    for row in rows:
        numbers = (f"{1e3 * value:.2f}" for value in (row.median_s, row.p20_s, row.p80_s))
        out.add_row(
            row.variant,
            *numbers,
            f"{row.gb_per_s:.1f}",
            f"{100 * row.share_of_copy:.0f} %",
            f"{row.median_s / own:.2f}",
        )
    return out


def save(rows: Sequence[Measurement], path: Path) -> None:
    """Append rows to a CSV file, with a header where it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Measurement.__dataclass_fields__))
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)

"""Counts and times the calls of a run, and sums them up as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lesa_kernels.ring import Ring
from lesa_kernels.stopwatch import Stopwatch


@dataclass(frozen=True)
class Summary:
    """What became of the last run.

    Args:
        steps: S, the steps of its schedule.
        full: calls of the model that ran its blocks, over all cache contexts.
        forecast: calls that skipped them.
        skipped_blocks: calls of blocks that were skipped.
        full_seconds: mean time of a full call, measured on the device; 0 where there was none.
        forecast_seconds: mean time of a forecast call: the forecast and the tail of the model.
        plan: the plan as text, empty where none could be made.
        history_bytes: memory that the histories of all cache contexts took together.
        history_memory: the device that they lay on, empty where there was none.
        refused: why the run went on without forecasts, None where nothing was unexpected.
        errors: (full step, mean |forecast - feature| / mean |feature|) of what the checked steps would have been
            forecast, the worst of all cache contexts; see `check_every` of `lesa.enable`.
        restarts: (step, reason) of each history that began in the middle of the run: its first step is full, and no
            earlier one serves its forecasts.
        unwatched: arguments of the model that are others in each step, so that no change of them is noticed.
    """

    steps: int
    full: int = 0
    forecast: int = 0
    skipped_blocks: int = 0
    full_seconds: float = 0.0
    forecast_seconds: float = 0.0
    plan: str = ""
    history_bytes: int = 0
    history_memory: str = ""
    refused: str | None = None
    errors: tuple[tuple[int, float], ...] = ()
    restarts: tuple[tuple[int, str], ...] = ()
    unwatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.steps} steps: {self.full} calls full, {self.forecast} forecast; "
            f"{self.skipped_blocks} calls of blocks skipped",
            f"time: {self.full_seconds * 1e3:.2f} ms a full call, {self.forecast_seconds * 1e3:.2f} ms a forecast call",
            f"history: {self.history_bytes / 2**20:.1f} MiB" + (self.history_memory and f" on {self.history_memory}"),
        ]
        if self.errors:
            steps = ", ".join(f"{error:.3g} (step {step})" for step, error in self.errors)
            lines.append(f"checked steps would have been forecast with a relative error of {steps}")
        lines += [f"a history began at step {step}: {reason}" for step, reason in self.restarts]
        if self.unwatched:
            lines.append(f"changes are not noticed of {', '.join(self.unwatched)}, made anew in each step")
        lines += [f"without forecasts from some step on: {self.refused}"] if self.refused else []
        return "\n".join(lines + ([f"plan: {self.plan}"] if self.plan else []))


@dataclass
class RunStats:
    """Collects what a `Summary` is made of while the run lasts."""

    steps: int
    blocks: int = 0  # in a full call
    full: Stopwatch = field(default_factory=Stopwatch)
    forecast: Stopwatch = field(default_factory=Stopwatch)
    plan: str = ""  # the first
    history_bytes: int = 0
    history_memory: str = ""
    refused: str | None = None
    errors: list[tuple[int, Tensor]] = field(default_factory=list)
    restarts: list[tuple[int, str]] = field(default_factory=list)
    unwatched: set[str] = field(default_factory=set)

    def add_ring(self, ring: Ring) -> None:
        """Count the memory of a ring that was just made."""
        self.history_bytes += ring.nbytes
        self.history_memory = str(ring.device)


def summarize(runs: Sequence[RunStats]) -> Summary:
    """Sum up the runs of a pipeline's models (Wan 2.2 has two); waits for the device to reach the last timed call."""
    full, forecast = sum(run.full.count for run in runs), sum(run.forecast.count for run in runs)
    return Summary(
        steps=runs[0].steps,
        full=full,
        forecast=forecast,
        skipped_blocks=sum(run.blocks * run.forecast.count for run in runs),
        full_seconds=sum(run.full.seconds for run in runs) / max(full, 1),
        forecast_seconds=sum(run.forecast.seconds for run in runs) / max(forecast, 1),
        plan="\n".join(run.plan for run in runs if run.plan),
        # One model's history is released when the next one begins.
        history_bytes=max(run.history_bytes for run in runs),
        history_memory=next((run.history_memory for run in runs if run.history_memory), ""),
        refused=next((run.refused for run in runs if run.refused), None),
        restarts=tuple(sorted({restart for run in runs for restart in run.restarts})),
        unwatched=tuple(sorted({name for run in runs for name in run.unwatched})),
        errors=_worst((step, float(error)) for run in runs for step, error in run.errors),
    )


def _worst(errors: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Return the largest error of each step; a NaN is the largest."""
    of_step: dict[int, list[float]] = {}
    for step, error in errors:
        of_step.setdefault(step, []).append(error)
    return tuple((step, max(of_step[step], key=lambda error: (math.isnan(error), error))) for step in sorted(of_step))

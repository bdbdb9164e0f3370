"""Where the denoising loop is, and on which noise levels: told by Python integers and by who holds the sigmas."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any


class Clock:
    """Reads step index and sigmas; no tensor value is read but the sigmas, once a run.

    Args:
        pipeline: whose scheduler counts (it is looked up at every call, as users replace it), or None.
        scheduler: a diffusers scheduler, or None.
        sigmas: S+1 noise levels where there is no scheduler, or None.

    Raises:
        ValueError: when none or several are given, or the scheduler has no sigmas, or there are fewer than two sigmas.
    """

    def __init__(self, pipeline: Any = None, scheduler: Any = None, sigmas: Sequence[float] | None = None) -> None:
        given = [
            name
            for name, value in (("pipeline", pipeline), ("scheduler", scheduler), ("sigmas", sigmas))
            if value is not None
        ]
        if len(given) != 1:
            raise ValueError(
                "lesa.enable: exactly one of a pipeline, scheduler= and sigmas= must tell the steps of the run, "
                f"got {' and '.join(given) or 'none'}"
            )
        # A strong reference would keep the pipeline's text encoders alive as long as its transformer.
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._scheduler = scheduler if pipeline is None else pipeline.scheduler
        self._sigmas = None if sigmas is None else read_sigmas(sigmas)
        if self._sigmas is not None and len(self._sigmas) < 2:
            raise ValueError(f"lesa.enable: sigmas must hold S+1 >= 2 values, got {len(self._sigmas)}")
        if self._sigmas is None and not (hasattr(self._scheduler, "sigmas") and hasattr(self._scheduler, "step_index")):
            raise ValueError(
                f"lesa.enable: the scheduler must have sigmas and a step_index, got {type(self._scheduler).__name__}; "
                "pass a bare transformer and sigmas= instead"
            )

    @property
    def has_scheduler(self) -> bool:
        """Whether a scheduler counts the steps: then a new run brings new sigmas, and a step may hold several calls."""
        return self._sigmas is None

    def scheduler(self) -> Any:
        """Return the scheduler of this moment, None where the sigmas were given."""
        pipeline = self._pipeline() if self._pipeline is not None else None
        if pipeline is not None:
            self._scheduler = pipeline.scheduler
        return self._scheduler

    def source(self) -> Any:
        """Return the object that holds the sigmas; schedulers make a new one for every run."""
        return self.scheduler().sigmas if self._sigmas is None else self._sigmas

    def step(self, context_step: int | None) -> int | None:
        """Return the step of this call: the cache context's, else the scheduler's, else None (count the calls)."""
        if context_step is not None:
            return context_step
        if self._sigmas is not None:
            return None
        scheduler = self.scheduler()
        # Schedulers set their index in step(), after the first call of the model; image-to-image begins late.
        if scheduler.step_index is None:
            return getattr(scheduler, "begin_index", None) or 0
        return int(scheduler.step_index)


def read_sigmas(source: Any) -> tuple[float, ...]:
    """Return noise levels as Python floats; for a tensor on a GPU this is the one wait of a run."""
    values = source.tolist() if hasattr(source, "tolist") else source
    return tuple(float(value) for value in values)

"""Measures how long repeated work takes on the device that does it, without waiting for the device meanwhile."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Adds up the times between `start` and `stop`: a CUDA device's own time through events, elsewhere wall clock.

    Args:
        count: how often it was stopped.
    """

    def __init__(self) -> None:
        self.count = 0
        self._seconds = 0.0
        self._began: torch.cuda.Event | float | None = None
        self._device = torch.device("cpu")
        self._unread: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self, device: torch.device) -> None:
        """Begin a measurement; one that was begun and not stopped is dropped."""
        self._device = device
        self._began = _event(device) if device.type == "cuda" else time.perf_counter()

    def stop(self) -> None:
        """End a measurement."""
        began, self._began = self._began, None
        if began is None:
            return
        self.count += 1
        if isinstance(began, float):
            self._seconds += time.perf_counter() - began
        else:
            self._unread.append((began, _event(self._device)))

    @property
    def seconds(self) -> float:
        """The sum so far; waits for the device to reach the last stop."""
        for began, ended in self._unread:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        self._unread.clear()
        return self._seconds


def _event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event

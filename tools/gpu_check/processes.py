"""Runs child processes within a time limit, and keeps their output."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.05
END_SECONDS = 10


@dataclass
class Job:
    """A command that runs by itself.

    Args:
        name: what the report calls it.
        command: the program and its arguments.
        log: takes what it prints.
        process: None before it was started.
        seconds: that it took.
        timed_out: whether it was ended before it ended by itself.
    """

    name: str
    command: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    seconds: float = 0.0
    timed_out: bool = False

    @property
    def code(self) -> int | None:
        """The exit status; None for a command that was not started or did not end by itself."""
        return None if self.process is None or self.timed_out else self.process.poll()

    def start(self, cwd: Path, env: Mapping[str, str]) -> None:
        """Start it in a process group of its own, so that it can be ended with its children."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            log.write(f"$ {' '.join(self.command)}\n".encode())
            log.flush()
            self.process = subprocess.Popen(
                self.command, cwd=cwd, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def stop(self) -> None:
        """End it and its children, if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.timed_out = True
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            # A process that waits for its device may not be there to end.
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self, lines: int = 30) -> str:
        """The last lines of what it has printed."""
        return "\n".join(self.text().splitlines()[-lines:])


def run_all(
    jobs: Sequence[Job],
    cwd: Path,
    env: Mapping[str, str],
    seconds: float,
    at_once: int = 1,
    ended: Callable[[Job], None] = lambda job: None,
) -> None:
    """Run commands side by side; none of them stops another.

    Args:
        jobs: what to run, in this order.
        cwd: where.
        env: their environment.
        seconds: for all of them; what has not ended then is ended.
        at_once: how many may run at a time.
        ended: is called with each job as soon as it ends; with one that was never started, at the end.
    """
    deadline = time.monotonic() + seconds
    waiting, running, began = list(jobs), list[Job](), dict[str, float]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                began[job.name] = time.monotonic()
                job.start(cwd, env)
                running.append(job)
            time.sleep(POLL_SECONDS)
            for job in [job for job in running if job.code is not None]:
                job.seconds = time.monotonic() - began[job.name]
                running.remove(job)
                ended(job)
            if time.monotonic() > deadline:
                return
    finally:
        for job in running:
            job.seconds = time.monotonic() - began[job.name]
            job.stop()
            ended(job)
        for job in waiting:
            job.timed_out = True
            ended(job)

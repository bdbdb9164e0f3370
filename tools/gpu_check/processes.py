"""Child processes: where their output goes, how long they may take, and how they are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.1


@dataclass
class Job:
    """A command that runs by itself.

    Args:
        name: what the report calls it.
        command: the program and its arguments.
        log: takes what it prints.
        accepted: the exit statuses that are no failure.
    """

    name: str
    command: Sequence[str]
    log: Path
    accepted: Sequence[int] = (0,)
    process: subprocess.Popen[bytes] | None = None
    seconds: float = 0.0
    timed_out: bool = False

    @property
    def code(self) -> int | None:
        """The exit status; None for a command that was not started or did not end by itself."""
        return None if self.process is None or self.timed_out else self.process.poll()

    @property
    def failed(self) -> bool:
        """Whether it ended by itself, and badly."""
        return self.code is not None and self.code not in self.accepted

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
            self.process.wait()

    def text(self) -> str:
        """What it has printed."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def run_all(
    jobs: Sequence[Job], cwd: Path, env: Mapping[str, str], seconds: float, at_once: int, stop_at_failure: bool = True
) -> None:
    """Run commands side by side.

    Args:
        jobs: what to run, in this order.
        cwd: where.
        env: their environment.
        seconds: for all of them; what has not ended then is ended.
        at_once: how many may run at a time.
        stop_at_failure: whether the first that fails ends the others.
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
                if job.failed and stop_at_failure:
                    return
            if time.monotonic() > deadline:
                return
    finally:
        for job in running:
            job.seconds = time.monotonic() - began[job.name]
            job.stop()


def join_logs(jobs: Sequence[Job], path: Path) -> None:
    """Write the logs of several jobs into one file, one after the other."""
    path.write_text("\n".join(f"==== {job.name}\n{job.text()}" for job in jobs))

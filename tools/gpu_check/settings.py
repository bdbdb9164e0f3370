"""Provides the device, the folders and the environment of child processes to all phases of a check."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.gpu_check.processes import Job
from tools.gpu_check.records import CUT, FAILED, Record, append

ROOT = Path(__file__).resolve().parents[2]
PACK = ROOT / "build" / "gpu-pack"
PACKED = "pack.json"
RECORDS, RESULTS, COUNTERS, CLOCKS = "records.jsonl", "results.csv", "counters.csv", "clocks.csv"
REPORT, LOGS = "report.md", "logs.tar.gz"
"""What a report consists of: six files in one folder."""
FILES = (RECORDS, RESULTS, COUNTERS, CLOCKS, REPORT, LOGS)


@dataclass(frozen=True)
class Settings:
    """What to check, and where.

    Args:
        device: "cuda", or "cpu" for a dry run.
        out: folder of the report.
        work: folder of logs, caches and unpacked wheels.
        pack: folder of what `tools.gpu_check.pack` made; it need not be there.
    """

    device: str
    out: Path
    work: Path
    pack: Path = PACK

    @property
    def cores(self) -> int:
        """How many processes may run side by side."""
        return max(1, len(os.sched_getaffinity(0)))

    @property
    def site(self) -> Path:
        """Where carried wheels are unpacked."""
        return self.work / "site"

    def env(self, **more: str) -> dict[str, str]:
        """Return the environment of child processes.

        A dry run sees no GPU. cuBLAS reads its setting once a process, at the first product of matrices. The caches of
        compiled kernels are shared by all phases.
        """
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        paths = [str(ROOT), str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "TRITON_CACHE_DIR": str(self.work / "cache" / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "cache" / "inductor"),
            **hidden,
            **more,
        }

    def job(self, name: str, command: Sequence[str]) -> Job:
        """Return a job whose output goes into the logs."""
        return Job(name, command, self.work / "logs" / f"{name.replace(' ', '-')}.log")

    def module(self, name: str, module: str, *arguments: str) -> Job:
        """Return a job that runs a Python module with this interpreter."""
        return self.job(name, [sys.executable, "-m", module, *arguments])

    def record(self, record: Record) -> None:
        """Write a record into the report."""
        append(record, self.out / RECORDS)

    def record_end(self, phase: str, job: Job) -> None:
        """Write down a job that did not end well: cut where its time was over, else failed."""
        if job.timed_out:
            self.record(Record(phase, job.name, CUT, f"not finished after {job.seconds:.0f} s", job.seconds))
        elif job.code != 0:
            self.record(Record(phase, job.name, FAILED, f"exit status {job.code}\n{job.tail()}", job.seconds))

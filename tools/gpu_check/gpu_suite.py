"""Runs the tests that need a GPU, file by file, each in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lesa_kernels.ops import OPS
from tools.gpu_check.processes import Job, run_all
from tools.gpu_check.records import LEFT_OUT, Record
from tools.gpu_check.settings import RECORDS, ROOT, Settings

# In this order: one serial file of great tensors comes last.
TESTS = (
    "tests/gpu/test_device.py",
    "tests/gpu/test_kernels.py",
    "tests/gpu/test_autograd.py",
    "tests/gpu/test_execution.py",
    *sorted({f"tests/triton/test_{op.family}.py" for op in OPS.values()}),
    "tests/gpu/test_large.py",
)
DIFFUSERS = (
    "tests/integrations/test_on_device.py",
    "tests/integrations/test_cuda_graph.py",
)
AT_ONCE = 4  # a file of great tensors takes a third of the GPU's memory
NO_TESTS = 5  # pytest's status where every test of a file was left out


def run(settings: Settings, seconds: float) -> None:
    """Run the tests of kernels."""
    _run(settings, "tests", TESTS, seconds)


def run_diffusers(settings: Settings, seconds: float) -> None:
    """Run the tests of diffusers' models, where diffusers is there."""
    _run(settings, "diffusers", DIFFUSERS, seconds)


def job_of(settings: Settings, phase: str, path: str) -> Job:
    """Return a job that runs the tests of a file or folder and writes a record of each at once."""
    # Warnings of other versions of torch and triton are no failures here, and a traceback must not keep tensors.
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--tb=native", "--maxfail=20"]
    records = ["-p", "tools.gpu_check.test_records", "--records", str(settings.out / RECORDS), "--phase", phase]
    command = [sys.executable, "-m", "pytest", *options, *records, path]
    return settings.job(f"{phase}-{path.replace('/', '-').removesuffix('.py')}", command)


def _run(settings: Settings, phase: str, paths: Sequence[str], seconds: float) -> None:
    if settings.device == "cpu" and phase == "tests":
        paths = paths[:1]

    def ended(job: Job) -> None:
        if job.code == NO_TESTS:
            settings.record(Record(phase, job.name, LEFT_OUT, job.tail(3), job.seconds))
        else:
            settings.record_end(phase, job)

    run_all([job_of(settings, phase, path) for path in paths], ROOT, settings.env(), seconds, AT_ONCE, ended)

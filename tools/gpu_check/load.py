"""Puts carried libraries and wheels into place and launches the first kernel; builds the libraries where that fails."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import zipfile
from collections.abc import Sequence

from lesa_kernels.files import replacing
from tools.gpu_check.processes import Job, run_all
from tools.gpu_check.records import CUT, FAILED, LEFT_OUT, PASSED, Record
from tools.gpu_check.settings import ROOT, Settings

PHASE = "load"
LIBRARIES = ("_cpu.so", "_cuda.so", "_build_info.json")
BUILD_SECONDS = 75  # on 16 cores
FIRST_LAUNCH_SECONDS = 25  # importing torch and starting CUDA take most of it


def put_into_place(settings: Settings) -> list[str]:
    """Copy the libraries of the pack into the package and unpack its wheels; return what was put where."""
    done = []
    for name in LIBRARIES:
        source, destination = settings.pack / name, ROOT / "lesa_kernels" / name
        if source.exists() and (not destination.exists() or source.read_bytes() != destination.read_bytes()):
            # By rename: writing into a library that a process has loaded would crash it.
            with replacing(destination) as unfinished:
                shutil.copyfile(source, unfinished)
            done.append(name)
    for wheel in sorted((settings.pack / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(settings.site)
        done.append(wheel.name)
    return done


def capability(log: str) -> str:
    """Return the GPU's architecture from what the first launch printed, as CMake names it; empty if it says none."""
    found = [json.loads(line)["architecture"] for line in log.splitlines() if line.startswith('{"architecture"')]
    return found[-1] if found else ""


def build_command() -> list[str]:
    """Return the command that builds the libraries in the checkout, with the tools that are there."""
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def run(settings: Settings, seconds: float) -> None:
    """Load what was carried, else build.

    Args:
        settings: of the check.
        seconds: for both together.
    """
    begin = time.monotonic()
    carried = put_into_place(settings)
    settings.record(Record(PHASE, "carried", PASSED, ", ".join(carried) or "nothing new"))
    launched = _first_launch(settings, "first launch", seconds)
    if launched.timed_out:  # a cold disk; what was carried may still be right
        launched = _first_launch(settings, "first launch, once more", seconds - (time.monotonic() - begin))
    _record(settings, launched, LEFT_OUT if launched.code else PASSED)
    if launched.code == 0:
        return
    # A machine without nvcc can be checked with LESA_BUILD=cpu: then Triton's kernels serve the GPU.
    wanted = "cpu" if settings.device == "cpu" else "cpu,cuda"
    env = settings.env(LESA_BUILD=os.environ.get("LESA_BUILD", wanted))
    if settings.device == "cuda":
        env.setdefault("CUDAARCHS", capability(launched.text()) or "90-real")
    build = settings.job("build", build_command())
    run_all([build], ROOT, env, seconds - (time.monotonic() - begin))
    if build.code == 0:
        settings.record(Record(PHASE, "build", PASSED, env.get("CUDAARCHS", "for the CPU"), build.seconds))
        launched = _first_launch(settings, "first launch after the build", seconds - (time.monotonic() - begin))
        _record(settings, launched, FAILED if launched.code else PASSED)
    else:
        settings.record_end(PHASE, build)


def _first_launch(settings: Settings, name: str, seconds: float) -> Job:
    job = settings.module(name, "tools.gpu_check.first_launch", settings.device)
    run_all([job], ROOT, settings.env(), min(FIRST_LAUNCH_SECONDS, max(seconds, 1)))
    return job


def _record(settings: Settings, job: Job, status: str) -> None:
    """Write down a launch; one of what was carried that fails is no fault while a build may repair it."""
    settings.record(Record(PHASE, job.name, CUT if job.timed_out else status, job.tail(), job.seconds))


def serve(records: Sequence[Record]) -> bool:
    """Whether compiled kernels serve, by what was written down."""
    return any(r.phase == PHASE and r.name.startswith("first launch") and r.status == PASSED for r in records)

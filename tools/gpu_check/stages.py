"""The stages: each returns an outcome, and what comes after a failed one does not run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tools.gpu_check.processes import Job, join_logs, run_all

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "gpu-check"
PASSED, FAILED, LEFT_OUT = "passed", "FAILED", "left out"

# The GPU's own tests first: they are the likeliest to fail.
FIRST_FOLDERS = ("gpu", "ops", "triton_kernels", "native")
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZER_FOUND = 86
NO_TESTS_LEFT = 5  # pytest's status where every file of a folder is skipped
# Of the time for all stages: together more than all of it, since most need less than their share.
SHARES = {"build": 0.5, "test": 0.5, "sanitize": 0.12, "bench": 0.3}
CLOCKS = "timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu"


@dataclass(frozen=True)
class Settings:
    """What to check and how long it may take.

    Args:
        device: "cuda", or "cpu" for a dry run.
        capability: of the GPU, as in "9.0"; empty without one.
        out: folder of the report.
        wheels: folder of further packages to install, or None.
        at_once: how many test processes run side by side.
        seconds: for all stages together.
        repeats: rounds of the benchmark.
        seconds_left: what earlier stages have left of `seconds`; None before the first.
    """

    device: str
    capability: str
    out: Path
    wheels: Path | None
    at_once: int
    seconds: float
    repeats: int
    seconds_left: float | None = None

    def limit(self, stage: str) -> float:
        """Return how long a stage may take: its share, and no more than is left."""
        return min(SHARES[stage] * self.seconds, self.seconds if self.seconds_left is None else self.seconds_left)

    def env(self, **more: str) -> dict[str, str]:
        """Return the environment of the children: a dry run sees no GPU."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        return {**os.environ, "PYTHONUNBUFFERED": "1", **hidden, **more}


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: `lines` are for the report, and after a failure show its end."""

    status: str
    summary: str
    lines: Sequence[str] = field(default_factory=tuple)


def venv_python() -> Path:
    """Return the interpreter that the package is installed for."""
    return WORK / "venv" / "bin" / "python"


def _tail(text: str, lines: int = 40) -> list[str]:
    return text.splitlines()[-lines:]


def _make_venv() -> None:
    """Make an environment that sees every package of this interpreter, also where this one is a virtual one itself."""
    folder = WORK / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", folder], check=True)
    packages = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(folder), "platbase": str(folder)}))
    seen = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (packages / "parent.pth").write_text("\n".join(seen) + "\n")


def build(settings: Settings) -> Outcome:
    """Build for the device here, without a network, with the torch and the tools that are there."""
    _make_venv()
    # What the user asks for wins: a machine without nvcc can be checked with LESA_BUILD=cpu.
    libraries = "cpu,cuda" if settings.device == "cuda" else "cpu"
    env = settings.env(LESA_BUILD=os.environ.get("LESA_BUILD", libraries))
    if settings.capability:
        env.setdefault("CUDAARCHS", settings.capability.replace(".", "") + "-real")
    pip = [str(venv_python()), "-m", "pip", "install", "--no-index", "--no-input"]
    here = ["--no-build-isolation", "--no-deps", "-v", "-e", str(ROOT)]
    status = [str(venv_python()), "-c", "import lesa_kernels; print(lesa_kernels.status())"]
    jobs = [
        Job("install", [*pip, *here], WORK / "logs" / "install.log"),
        Job("status", status, WORK / "logs" / "status.log"),
    ]
    if settings.wheels is not None:
        wheels = sorted(map(str, settings.wheels.glob("*.whl")))
        jobs.insert(0, Job("wheels", [*pip, "--no-deps", *wheels], WORK / "logs" / "wheels.log"))
    run_all(jobs, ROOT, env, settings.limit("build"), at_once=1)
    join_logs(jobs, settings.out / "build.log")
    bad = next((job for job in jobs if job.code != 0), None)
    if bad is not None:
        return Outcome(FAILED, f"{bad.name} failed", _tail(bad.text()))
    return Outcome(PASSED, env.get("CUDAARCHS", "for the CPU only"), jobs[-1].text().splitlines()[1:])


def _test_jobs() -> list[Job]:
    """Return one pytest for each folder of tests, and one for the files beside them."""
    tests = ROOT / "tests"
    folders = sorted(path.name for path in tests.iterdir() if path.is_dir() and any(path.rglob("test_*.py")))
    ordered = [*(name for name in FIRST_FOLDERS if name in folders), *(n for n in folders if n not in FIRST_FOLDERS)]
    groups = {name: [f"tests/{name}"] for name in ordered}
    beside = sorted(f"tests/{path.name}" for path in tests.glob("test_*.py"))
    groups |= {"others": beside} if beside else {}
    options = ["-x", "-q", "-p", "no:cacheprovider"]
    return [
        Job(
            name,
            [str(venv_python()), "-m", "pytest", *options, f"--junitxml={WORK / 'junit' / name}.xml", *paths],
            WORK / "logs" / f"test-{name}.log",
            accepted=(0, NO_TESTS_LEFT),
        )
        for name, paths in groups.items()
    ]


def _reason(skip: xml.etree.ElementTree.Element) -> str:
    """Return why a test was skipped; for a whole file pytest gives the reason in the text only."""
    message = skip.get("message", "")
    whole = (skip.text or "").rpartition("Skipped: ")[2].removesuffix("')")
    return whole if message == "collection skipped" else message


def _counts(job: Job) -> tuple[Counter[str], Counter[str]]:
    """Return how many tests of a folder ended how, and the reasons of those that were skipped."""
    path = WORK / "junit" / f"{job.name}.xml"
    ends: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for case in xml.etree.ElementTree.parse(path).iter("testcase") if path.exists() else ():
        kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
        ends[kinds.pop() if kinds else "passed"] += 1
        reasons.update(_reason(skip) for skip in case.iter("skipped"))
    return ends, reasons


def test(settings: Settings) -> Outcome:
    """Run the whole suite; the first failure ends it."""
    shutil.rmtree(WORK / "junit", ignore_errors=True)
    jobs = _test_jobs()
    threads = max(1, len(os.sched_getaffinity(0)) // settings.at_once)
    limit = settings.limit("test")
    run_all(jobs, ROOT, settings.env(OMP_NUM_THREADS=str(threads)), limit, settings.at_once)
    join_logs(jobs, settings.out / "test.log")
    total: Counter[str] = Counter()
    skips: Counter[str] = Counter()
    lines = []
    for job in jobs:
        ends, reasons = _counts(job)
        total, skips = total + ends, skips + reasons
        counted = ", ".join(f"{count} {end}" for end, count in sorted(ends.items())) or "nothing ran"
        lines.append(f"tests/{job.name}: {counted} in {job.seconds:.0f} s")
    lines += [f"skipped {count} x: {reason}" for reason, count in skips.most_common()]
    summary = f"{total['passed']} passed, {total['skipped']} skipped"
    failed = next((job for job in jobs if job.failed), None)
    if failed is not None:
        return Outcome(FAILED, f"tests/{failed.name} failed", [*lines, "", *_tail(failed.text())])
    unfinished = [job.name for job in jobs if job.code is None]
    if unfinished:
        return Outcome(FAILED, f"not finished within {limit:.0f} s: {', '.join(unfinished)}", lines)
    return Outcome(PASSED, summary, lines)


def _sanitizer_jobs(sanitizer: str) -> list[Job]:
    slice_ = ["tests/gpu/test_kernels.py", "-k", "matches_the_reference and bfloat16"]
    program = [str(venv_python()), "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *slice_]
    shared = ["--target-processes", "application-only", "--error-exitcode", str(SANITIZER_FOUND)]
    extra = {
        "memcheck": ["--report-api-errors", "no"],  # torch asks CUDA questions that it may refuse
        "racecheck": ["--kernel-name", "kns=lesa"],
        "synccheck": ["--kernel-name", "kns=lesa"],
    }
    return [
        Job(tool, [sanitizer, "--tool", tool, *shared, *extra[tool], *program], WORK / "logs" / f"{tool}.log")
        for tool in SANITIZER_TOOLS
    ]


def _sanitizer_verdict(job: Job) -> tuple[str, str]:
    """Return how a tool ended and what to say of it: a tool that could not run has proven nothing, right or wrong."""
    summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*", job.text())
    if job.timed_out:
        return LEFT_OUT, "did not finish in its time"
    if job.code == SANITIZER_FOUND:
        return FAILED, summary[-1] if summary else "found errors"
    if not summary:
        return LEFT_OUT, f"could not run here: {(_tail(job.text(), 1) or ['no output'])[0]}"
    return (PASSED if job.code == 0 else FAILED), summary[-1]


def sanitize(settings: Settings) -> Outcome:
    """Run a slice of the kernels under compute-sanitizer, where there is one."""
    places = ["compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer"]
    sanitizer = next(filter(None, map(shutil.which, places)), None)
    if settings.device == "cpu" or sanitizer is None:
        return Outcome(LEFT_OUT, "a dry run" if settings.device == "cpu" else "compute-sanitizer was not found")
    jobs = _sanitizer_jobs(sanitizer)
    # Without torch's cache each tensor is an allocation of its own, and an access past its end is seen.
    env = settings.env(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    run_all(jobs, ROOT, env, settings.limit("sanitize"), at_once=len(jobs), stop_at_failure=False)
    join_logs(jobs, settings.out / "sanitize.log")
    verdicts = {job.name: _sanitizer_verdict(job) for job in jobs}
    lines = [f"{name}: {status}, {text}" for name, (status, text) in verdicts.items()]
    ends = [status for status, _ in verdicts.values()]
    worst = next((status for status in (FAILED, LEFT_OUT) if status in ends), PASSED)
    failed = next((job for job in jobs if verdicts[job.name][0] == FAILED), None)
    summary = ", ".join(f"{name} {status}" for name, (status, _) in verdicts.items())
    return Outcome(worst, summary, [*lines, *(["", *_tail(failed.text())] if failed else [])])


@contextmanager
def _clocks_recorded(settings: Settings) -> Iterator[None]:
    """Write the GPU's clocks, power and temperature into the report, every two seconds."""
    if settings.device == "cpu" or shutil.which("nvidia-smi") is None:
        yield
        return
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv", "-l", "2", "-f", str(settings.out / "clocks.csv")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def bench(settings: Settings) -> Outcome:
    """Measure; the benchmark refuses to time a kernel whose result is wrong."""
    options = ["--device", settings.device, "--repeats", str(settings.repeats), "--save"]
    limit = settings.limit("bench")
    files = ["--out", str(settings.out / "results.csv"), "--seconds", f"{0.8 * limit:.0f}"]
    job = Job("bench", [str(venv_python()), "-m", "benchmarks", *options, *files], settings.out / "bench.log")
    with _clocks_recorded(settings):
        # One process: nothing may disturb it.
        run_all([job], ROOT, settings.env(), limit, at_once=1)
    left_out = [line for line in job.text().splitlines() if "cases left out" in line]
    if job.code != 0:
        why = f"not finished within {limit:.0f} s" if job.timed_out else "stopped"
        return Outcome(FAILED, why, _tail(job.text()))
    return Outcome(PASSED, "; ".join(["every variant matched the reference before it was timed", *left_out]))


STAGES: dict[str, Callable[[Settings], Outcome]] = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}

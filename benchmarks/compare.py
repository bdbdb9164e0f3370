"""Compares two commits in one run: each in a process of its own, the samples interleaved."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.harness import quantiles

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "baselines"


class Compared(NamedTuple):
    """Seconds of one variant of a case at both commits, a sample a round."""

    variant: str
    base: list[float]
    here: list[float]


def checked_out(revision: str, kind: str, console: Console) -> Path:
    """Return a checkout of a commit with its library for a kind of device built; it is kept for the next time.

    Raises:
        ValueError: when git knows no such commit.
        RuntimeError: when it does not build.
    """
    found = _run(["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"], ROOT)
    if found.returncode:
        raise ValueError(f"--baseline must name a commit, got {revision}")
    commit = found.stdout.strip()
    tree, built = BUILD / commit[:12], BUILD / f"{commit[:12]}.{kind}"
    if built.exists():
        return tree
    console.print(f"building {revision} ({commit[:12]}) in {tree.relative_to(ROOT)} ...")
    if not tree.exists():
        tree.parent.mkdir(parents=True, exist_ok=True)
        # Forced, as git remembers a checkout that `make clean` took.
        _must(_run(["git", "worktree", "add", "--force", "--detach", str(tree), commit], ROOT), "checked out")
    _must(_run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, LESA_BUILD=kind), "built")
    built.touch()
    return tree


def _run(command: Sequence[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)


def _must(result: subprocess.CompletedProcess[str], what: str) -> None:
    if result.returncode:
        raise RuntimeError(f"the baseline could not be {what}: {result.stderr.strip()[-2000:]}")


class Worker:
    """A process that measures with the package of one tree and the benchmarks of this one.

    Args:
        tree: a checkout with libraries.
        device: what to measure on.
    """

    def __init__(self, tree: Path, device: str) -> None:
        self._folder = BUILD / f"{tree.name}-path"
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, target in (("benchmarks", ROOT / "benchmarks"), ("lesa_kernels", tree / "lesa_kernels")):
            link = self._folder / name
            link.unlink(missing_ok=True)
            link.symlink_to(target)
        # Threads that wait for work by spinning would take the core of the other process.
        environment = {**os.environ, "PYTHONPATH": str(self._folder), "OMP_WAIT_POLICY": "passive"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", device, str(tree)],
            cwd=self._folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, **request: Any) -> Any:
        """Send a request (see `benchmarks.worker`) and return the answer.

        Raises:
            RuntimeError: when the process died: the tree lacks what the benchmarks import.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the benchmarks do not run on {self._folder.name}; its messages stand above")
        return json.loads(line)


def compare(base: Worker, here: Worker, number: int, repeats: int) -> tuple[str, list[Compared] | str]:
    """Measure a case at both commits, in rounds that alternate which goes first.

    Args:
        base: measures the baseline.
        here: measures this tree.
        number: the case's place in the suite.
        repeats: rounds.

    Returns:
        The case's title, and what both have of its variants that this package serves; or why there is nothing.
    """
    workers = {"base": base, "here": here}
    opened = {name: worker.ask(open=number) for name, worker in workers.items()}
    title: str = opened["here"].get("title", f"case {number}")
    for name, answer in opened.items():
        if "error" in answer:
            return title, f"left out, {'the baseline' if name == 'base' else 'this tree'}: {answer['error']}"
    shared = [variant for variant in opened["here"]["variants"] if variant in opened["base"]["variants"]]
    samples: dict[str, list[dict[str, float]]] = {"base": [], "here": []}
    for turn in range(repeats + 1):
        for name in ("base", "here") if turn % 2 else ("here", "base"):
            times = workers[name].ask(round=turn)
            if turn:  # the first one warms up
                samples[name].append(times)
    return title, [
        Compared(variant, *([times[variant] for times in samples[name]] for name in ("base", "here")))
        for variant in shared
    ]


def table(title: str, rows: Sequence[Compared]) -> Table:
    """Lay out one case: milliseconds of both commits, and how many times as fast this one is."""
    out = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    out.add_column("variant")
    for name in ("baseline ms", "p20", "p80", "here ms", "p20", "p80", "times as fast"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        base, here = quantiles(row.base), quantiles(row.here)
        numbers = [f"{1e3 * value:.4g}" for value in (*base, *here)]
        out.add_row(row.variant, *numbers, f"{base[0] / here[0]:.2f}")
    return out

"""Checks ops against float64 in a process of its own, since an error of CUDA leaves a process unusable.

`python -m tools.gpu_check.smoke DEVICE ENGINE RECORDS OP ...`; `--first-capture` checks that an op's first call may be
captured in a graph instead.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from lesa_kernels.backends.libraries import libraries
from tools.gpu_check.calls import ALIGNED, CALLS, ODD, Call, Size, capture, first_wrong, namespaces
from tools.gpu_check.processes import Job, run_all
from tools.gpu_check.records import FAILED, LEFT_OUT, PASSED, Record, append
from tools.gpu_check.settings import RECORDS, ROOT, Settings

PHASE = "smoke"
SIZES = (ALIGNED, ODD)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IN_PLACE = ("push", "forecast_into")
REPEATS = 3
SLOW_TO_COMPILE = ("gram", "kan_linear_backward", "predict_l1", "predict_backward")


class Wrong(Exception):
    """A check found something wrong: the text says what, the figures how much."""

    def __init__(self, text: str, figures: dict[str, Any] | None = None) -> None:
        super().__init__(text)
        self.figures = figures or {}


class NotHere(Exception):
    """A check cannot run here; the text says why."""


def run(settings: Settings, seconds: float) -> None:
    """Check every op on every engine, each in a process of its own, several at a time."""
    records, jobs = str(settings.out / RECORDS), []
    for engine, ops, options in wanted(settings.device):
        name = "-".join([PHASE, engine, *ops, *options])
        arguments = [settings.device, engine, records, *ops, *options]
        jobs.append(settings.module(name, "tools.gpu_check.smoke", *arguments))

    def ended(job: Job) -> None:
        settings.record_end(PHASE, job)

    run_all(jobs, ROOT, settings.env(OMP_NUM_THREADS="1"), seconds, settings.cores + 2, ended)


def wanted(device: str) -> list[tuple[str, list[str], list[str]]]:
    """Return engine, ops and options of each process, in the order they start.

    What compiles longest starts first. Triton compiles at an op's first call, which no capture can hold. On the CPU no
    error of one op spoils the next one: a process for each engine is enough.
    """
    if device == "cpu":
        return [("triton", list(CALLS), []), ("lesa", list(CALLS), [])]
    slowest_first = [*SLOW_TO_COMPILE, *(op for op in CALLS if op not in SLOW_TO_COMPILE)]
    return [
        *(("triton", [op], []) for op in slowest_first),
        *(("lesa", [op], []) for op in CALLS),
        *(("lesa", [op], ["--first-capture"]) for op in CALLS),
    ]


def _judged(call: Call, outputs: list[Tensor]) -> dict[str, Any]:
    errors = call.errors(outputs)
    figures = {"of_allowed": max(error.of_allowed for error in errors), "outputs": [asdict(error) for error in errors]}
    if text := first_wrong(errors):
        raise Wrong(text, figures)
    return figures


def values(call: Call, ops: Any) -> dict[str, Any]:
    """Every output lies within the tolerance."""
    return _judged(call, call.run(ops))


def same_bits(call: Call, ops: Any) -> dict[str, Any]:
    """The same input gives the same bits."""
    first = [output.clone() for output in call.run(ops)]
    for _ in range(REPEATS):
        for number, (one, other) in enumerate(zip(first, call.run(ops), strict=True)):
            if not torch.equal(one, other):
                raise Wrong(f"output {number} has other bits in another call: {int((one != other).sum())} elements")
    return {}


def graph_replay(call: Call, ops: Any, warm: bool = True) -> dict[str, Any]:
    """A replayed graph sees new data."""
    _needs_gpu()
    replay, outputs = capture(lambda: call.run(ops), warm)
    found: dict[str, Any] = {}
    for _ in range(REPEATS):
        call.draw()
        for output in outputs:
            output.fill_(torch.nan)
        replay()
        found = _judged(call, outputs)
    return found


def first_capture(call: Call, ops: Any) -> dict[str, Any]:
    """The first call of a process may be captured."""
    return graph_replay(call, ops, warm=False)


def no_sync(call: Call, ops: Any) -> dict[str, Any]:
    """No call waits for the device."""
    _needs_gpu()
    call.run(ops)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call.run(ops)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {}


def no_allocation(call: Call, ops: Any) -> dict[str, Any]:
    """An op that writes into a ring allocates nothing."""
    _needs_gpu()
    call.run(ops)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    call.run(ops)
    more = torch.cuda.memory_stats()["allocation.all.allocated"] - before
    if more:
        raise Wrong(f"{more} allocations in a call that must make none")
    return {}


def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        raise NotHere("needs a GPU")


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


Check = tuple[str, Callable[[Call, Any], dict[str, Any]], torch.dtype, Size]
"""Name, check, dtype and size."""


def checks(op: str) -> Iterator[Check]:
    """Yield what is checked of an op, the most important first."""
    for size in SIZES:
        for dtype in DTYPES:
            yield "values", values, dtype, size
    for dtype in DTYPES:
        yield "same bits", same_bits, dtype, ALIGNED
    yield "no sync", no_sync, torch.bfloat16, ODD
    if op in IN_PLACE:
        yield "no allocation", no_allocation, torch.bfloat16, ODD
    # A capture that fails may spoil what comes after it.
    yield "graph replay", graph_replay, torch.bfloat16, ODD


def check_op(op: str, engine: str, device: str, which: Iterable[Check], write: Callable[[Record], None]) -> None:
    """Run checks of an op; what goes wrong in one is written down and the next one runs.

    Args:
        op: its name.
        engine: "lesa" or "triton".
        device: "cuda" or "cpu".
        which: the checks.
        write: takes each record at once.
    """
    for name, check, dtype, size in which:
        title = f"{op} {engine}: {name}, {str(dtype).removeprefix('torch.')}, {size.name}"
        begin, found, status, text = time.monotonic(), dict[str, Any](), PASSED, ""
        try:
            ops = namespaces()[engine]
            if engine == "triton" and device == "cpu":
                raise NotHere("Triton's kernels need a GPU")
            if engine == "lesa" and device == "cuda" and not _compiled_kernels_serve():
                raise NotHere("the library _cuda is not loaded: what serves is Triton")
            with torch.device(device), _poisoned():
                torch.manual_seed(0)
                found = check(CALLS[op](dtype, size), ops)
                if device == "cuda":
                    torch.cuda.synchronize()
        except NotHere as reason:
            status, text = LEFT_OUT, str(reason)
        except Wrong as reason:
            status, text, found = FAILED, str(reason), reason.figures
        except Exception:
            status, text = FAILED, traceback.format_exc(limit=-4)
        details = {"op": op, "engine": engine, "check": name, **found}
        write(Record(PHASE, title, status, text, time.monotonic() - begin, details))
        if status == FAILED and not alive(device):
            raise SystemExit(f"{title}: an error of CUDA ends this process")


def _compiled_kernels_serve() -> bool:
    return any(library.name == "_cuda" and library.loaded for library in libraries())


def alive(device: str) -> bool:
    """Whether a device still computes for this process."""
    try:
        return bool(torch.zeros(1, device=device).item() == 0)
    except Exception:
        return False


def main(
    device: Annotated[str, typer.Argument(help="cuda or cpu.")],
    engine: Annotated[str, typer.Argument(help="lesa or triton.")],
    records: Annotated[Path, typer.Argument(help="The file that takes the results.")],
    op: Annotated[list[str], typer.Argument(help="The ops to check.")],
    first: Annotated[
        bool, typer.Option("--first-capture", help="Check a first call that is captured instead.")
    ] = False,
    quick: Annotated[bool, typer.Option(help="Check the values of one dtype only.")] = False,
) -> None:
    """Check ops on one engine."""
    for name in op:
        which = [("first capture", first_capture, torch.bfloat16, ODD)] if first else checks(name)
        if quick:
            which = [("values", values, torch.bfloat16, ODD)]
        check_op(name, engine, device, which, lambda record: append(record, records))


if __name__ == "__main__":
    typer.run(main)

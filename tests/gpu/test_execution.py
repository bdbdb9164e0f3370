"""How the ops run: graphs, streams, devices, no sync, no allocation."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lesa_kernels import LesaPredictor, Schedule, Session
from lesa_kernels.backends import libraries
from tools.gpu_check.calls import CALLS, ODD, Call, capture
from tools.gpu_check.records import PASSED, load

DEVICE = torch.device("cuda")
DELAY_CYCLES = 20_000_000  # some 10 ms: longer than the host needs to go on


@contextmanager
def _syncs_are_errors() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _allocations() -> int:
    return torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"]


def test_a_replayed_graph_sees_new_data_and_coefficients(call: Call, ops: Any) -> None:
    replay, outputs = capture(lambda: call.run(ops))
    for _ in range(3):
        call.draw()
        for output in outputs:
            output.fill_(torch.nan)
        replay()
        assert not call.wrong(outputs)


def test_the_first_call_may_be_captured(tmp_path: Path) -> None:
    """C++ kernels load themselves inside a capture; Triton's cannot."""
    if not any(library.name == "_cuda" and library.loaded for library in libraries.libraries()):
        pytest.skip("the library _cuda is not loaded")
    records = tmp_path / "records.jsonl"
    command = [sys.executable, "-m", "tools.gpu_check.smoke", "cuda", "lesa", str(records), *CALLS, "--first-capture"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    found = load(records)
    assert len(found) == len(CALLS) and [record for record in found if record.status != PASSED] == []


def test_triton_says_what_to_do_where_the_first_call_is_captured() -> None:
    launchers = importlib.import_module("lesa_kernels.backends.triton")
    with DEVICE:
        # As many features as no other test has: their kernel is not loaded.
        history, parameters = [torch.ones(64)] * 23, (torch.ones(23), torch.ones(1), torch.ones(1))
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        history[0].add_(1)  # a graph must not be empty
        with pytest.raises(RuntimeError, match=r"lesa::predict: .* call the op once with the same arguments first"):
            launchers.predict(history, *parameters)
    want = launchers.predict(history, *parameters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = launchers.predict(history, *parameters)
    graph.replay()
    assert torch.equal(got, want)


def test_no_op_waits_for_the_device(call: Call, ops: Any) -> None:
    call.run(ops)
    with _syncs_are_errors():
        call.run(ops)


@pytest.mark.parametrize("name", ["push", "forecast_into"])
def test_writing_into_the_ring_allocates_nothing(name: str, dtype: torch.dtype, ops: Any) -> None:
    with DEVICE:
        call = CALLS[name](dtype, ODD)
    call.run(ops)
    before = _allocations()
    call.run(ops)
    assert _allocations() == before


@pytest.mark.parametrize("name", CALLS)
def test_ops_run_on_the_current_stream(name: str, ops: Any) -> None:
    """Two streams at once: each draws its inputs late, so that a kernel on another stream would read the old ones."""
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    with DEVICE:
        calls = [CALLS[name](torch.bfloat16, ODD) for _ in streams]
    for call in calls:
        call.run(ops)  # what compiles must not do so between the streams
    torch.cuda.synchronize()
    outputs: list[list[Tensor]] = []
    for stream, call in zip(streams, calls, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(DELAY_CYCLES)
            call.draw()
            outputs.append(call.run(ops))
    torch.cuda.synchronize()
    for call, written in zip(calls, outputs, strict=True):
        assert not call.wrong(written)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only: a second device is not tested")
def test_ops_run_on_the_device_of_their_tensors(ops: Any) -> None:
    for make in CALLS.values():
        with torch.device("cuda:1"):
            call = make(torch.bfloat16, ODD)
        assert torch.cuda.current_device() == 0
        outputs = call.run(ops)
        assert torch.cuda.current_device() == 0 and all(output.device.index == 1 for output in outputs)
        assert not call.wrong(outputs)


def test_a_sampling_run_neither_waits_nor_allocates_once_its_ring_is_there(flux_sigmas: list[float]) -> None:
    plan = LesaPredictor(num_steps=50).plan(flux_sigmas, Schedule.interval(50, 7))
    features = {step: torch.randn(2, 64, 128) for step in plan.full_steps}
    kept = torch.empty(50, 2, 64, 128, device=DEVICE)

    def run(session: Session, given: dict[int, Tensor], forecasts: Tensor) -> None:
        for step in range(plan.num_steps):
            if plan.is_full(step):
                session.push(step, given[step])
            else:
                torch.ops.lesa.push(forecasts, session.forecast(step), step)

    want = torch.empty(kept.shape)
    run(Session(plan), features, want)
    session = Session(plan)
    on_gpu = {step: feature.to(DEVICE) for step, feature in features.items()}
    run(session, on_gpu, kept)
    before = _allocations()
    with _syncs_are_errors():
        run(session, on_gpu, kept)
    assert _allocations() == before
    for step in set(range(plan.num_steps)) - set(plan.full_steps):
        assert (kept[step].cpu() - want[step]).norm() < 1e-4 * want[step].norm()

"""What a run measures on a kind of device, what matters most first."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.cases import forecast_case, predict_case, push_case, taylor_case, threads_case
from benchmarks.clock import Clock
from benchmarks.harness import Case
from benchmarks.memory import pages_case
from benchmarks.sweeps import elements_case, rows_case
from benchmarks.training import gram_case, kan_case, predict_l1_case, training_step_case

FLUX, QWEN, SMALL, TINY = "FLUX 1024x1024", "Qwen-Image 1328x1328", "digits, batch 20", "8 x 8"
VIDEO, HIDDEN = "HunyuanVideo 720p, model output", "HunyuanVideo 720p, hidden"
RESIDENT = "200 x 1000 elements"
KAN_ROWS = (1, 50)
# Time against the number of elements, of inputs, of rows.
ELEMENTS = tuple(4**power for power in range(3, 13))
INPUTS = (1, 2, 3, 4, 6, 8, 12)
ROWS = (1, 2, 3, 4, 6, 8, 12)


class Entry(NamedTuple):
    """A case that is made when its turn comes: together their inputs would not fit into memory."""

    op: str
    make: Callable[[Clock], Case]


def suite(device: torch.device) -> list[Entry]:
    """Return the cases for a kind of device."""
    small = [
        Entry("predict", partial(predict_case, SMALL, dtype=torch.float32, small=True)),
        Entry("forecast", partial(forecast_case, SMALL, dtype=torch.float32, small=True)),
        Entry("push", partial(push_case, SMALL, dtype=torch.float32, small=True)),
        Entry("predict", partial(predict_case, TINY, dtype=torch.float32, small=True)),
    ]
    networks = [Entry("kan_linear", partial(kan_case, rows)) for rows in KAN_ROWS]
    makers: dict[str, Callable[..., Case]] = {
        "predict": predict_case,
        "forecast": forecast_case,
        "predict_l1": predict_l1_case,
        "gram": gram_case,
    }
    steps = [
        Entry("TaylorSeer segment", partial(taylor_case, FLUX)),
        Entry("training step", partial(training_step_case, FLUX)),
    ]
    others = [
        Entry("push", partial(push_case, FLUX)),
        *(Entry("predict", partial(predict_case, FLUX, dtype=dtype)) for dtype in (torch.float32, torch.float16)),
        *(Entry(op, partial(makers[op], FLUX, count=4)) for op in ("predict", "forecast")),
        *(Entry(op, partial(makers[op], VIDEO)) for op in ("predict", "forecast")),
    ]
    if device.type == "cpu":
        large = [
            *(Entry(op, partial(make, FLUX)) for op, make in makers.items()),
            Entry("predict", partial(predict_case, QWEN)),
            Entry("forecast", partial(forecast_case, QWEN, published=False)),
            Entry("predict", partial(predict_case, HIDDEN, count=4, published=False)),
        ]
        threads = [
            Entry("threads", partial(threads_case, RESIDENT, cold=False)),
            Entry("threads", partial(threads_case, FLUX)),
            *(Entry("fresh pages", partial(pages_case, size)) for size in (FLUX, QWEN)),
        ]
        loss = Entry("predict_l1", partial(predict_l1_case, SMALL, dtype=torch.float32))
        return [*large, *steps, *small, loss, *networks, *threads, *others, Entry("sampling run", _sampling)]
    large = [Entry(op, partial(make, size)) for size in (FLUX, QWEN) for op, make in makers.items()]
    hidden = [Entry(op, partial(makers[op], HIDDEN, published=False)) for op in ("predict", "forecast")]
    return [*large, *networks, *steps, *small, *others, *hidden, Entry("sampling run", _sampling)]


def _sampling(clock: Clock) -> Case:
    # Diffusers is needed for nothing else here.
    from benchmarks.sampling import sampling_case

    return sampling_case(20, clock)


def missing(entry: Entry) -> str | None:
    """Return the package that a case needs and that is not installed, None if it can run."""
    return "diffusers" if entry.make is _sampling and importlib.util.find_spec("diffusers") is None else None


def sweeps() -> list[Entry]:
    """Return what the plots of time against the number of elements, inputs and rows are made of."""
    return [
        *(Entry("elements", partial(elements_case, count)) for count in ELEMENTS),
        *(Entry("inputs", partial(rows_case, FLUX, count=count, rows=1, op="inputs")) for count in INPUTS),
        *(Entry("rows", partial(rows_case, FLUX, count=8, rows=rows, op="rows")) for rows in ROWS),
    ]

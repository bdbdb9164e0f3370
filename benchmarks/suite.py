"""Lists the cases for a kind of device, the most important first."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.bench_forecast import forecast_case, push_case, spectrum_case, taylor_case, threads_case
from benchmarks.bench_gram import gram_case
from benchmarks.bench_identity import identity_case
from benchmarks.bench_kan import kan_case
from benchmarks.bench_memory import ceiling_case, pages_case
from benchmarks.bench_predict import predict_backward_case, predict_case, predict_l1_case, training_step_case
from benchmarks.clock import Clock
from benchmarks.harness import Case
from benchmarks.sweeps import elements_case, rows_case

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

    @property
    def size(self) -> str:
        """What distinguishes the case from others of its op, where it could not be made."""
        given = self.make if isinstance(self.make, partial) else partial(self.make)
        return ", ".join([*map(str, given.args), *(f"{name}={value}" for name, value in given.keywords.items())])


MAKERS: dict[str, Callable[..., Case]] = {
    "predict": predict_case,
    "forecast": forecast_case,
    "predict_l1": predict_l1_case,
    "gram": gram_case,
}


def headline(device: torch.device) -> list[Entry]:
    """Return the cases that a GPU is judged by, what matters most first: a run may end before the last of them.

    On the CPU these are a rehearsal, at small sizes.
    """
    flux, qwen = (FLUX, QWEN) if device.type == "cuda" else (SMALL, TINY)
    return [
        *(Entry(op, partial(make, flux)) for op, make in MAKERS.items()),
        Entry("push", partial(push_case, flux)),
        Entry("ceiling", ceiling_case),
        *(Entry("kan_linear", partial(kan_case, rows)) for rows in KAN_ROWS),
        Entry("predict_backward", partial(predict_backward_case, flux)),
        Entry("gram", partial(gram_case, flux, count=16)),
        *(Entry(op, partial(make, qwen)) for op, make in MAKERS.items()),
        Entry("TaylorSeer segment", partial(taylor_case, flux)),
        Entry("Spectrum segment", partial(spectrum_case, flux)),
        Entry("training step", partial(training_step_case, flux)),
    ]


def suite(device: torch.device) -> list[Entry]:
    """Return the cases for a kind of device."""
    small = [
        Entry("predict", partial(predict_case, SMALL, dtype=torch.float32, small=True)),
        Entry("forecast", partial(forecast_case, SMALL, dtype=torch.float32)),
        Entry("push", partial(push_case, SMALL, dtype=torch.float32)),
        Entry("identity", partial(identity_case, TINY, dtype=torch.float32)),
        Entry("predict", partial(predict_case, TINY, dtype=torch.float32, small=True)),
    ]
    networks = [Entry("kan_linear", partial(kan_case, rows)) for rows in KAN_ROWS]
    steps = [
        Entry("TaylorSeer segment", partial(taylor_case, FLUX)),
        Entry("training step", partial(training_step_case, FLUX)),
    ]
    others = [
        *(Entry("predict", partial(predict_case, FLUX, dtype=dtype)) for dtype in (torch.float32, torch.float16)),
        *(Entry(op, partial(MAKERS[op], FLUX, count=4)) for op in ("predict", "forecast")),
        *(Entry(op, partial(MAKERS[op], VIDEO)) for op in ("predict", "forecast")),
    ]
    if device.type == "cpu":
        large = [
            *(Entry(op, partial(make, FLUX)) for op, make in MAKERS.items()),
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
        push = Entry("push", partial(push_case, FLUX))
        others = [push, *others, Entry("sampling run", _sampling)]
        return [*large, *steps, *small, loss, *networks, *threads, *others]
    hidden = [Entry(op, partial(MAKERS[op], HIDDEN, published=False)) for op in ("predict", "forecast")]
    return [*headline(device), *small, *others, *hidden, Entry("sampling run", _sampling)]


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

"""What a run measures on a kind of device, what matters most first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.cases import forecast_case, predict_case, push_case
from benchmarks.clock import Clock
from benchmarks.harness import Case
from benchmarks.training import gram_case, kan_case, predict_l1_case, training_step_case

FLUX, QWEN, SMALL = "FLUX 1024x1024", "Qwen-Image 1328x1328", "digits, batch 20"
KAN_ROWS = (1, 50)


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
    ]
    networks = [Entry("kan_linear", partial(kan_case, rows)) for rows in KAN_ROWS]
    if device.type == "cpu":
        large = [
            Entry("predict", partial(predict_case, FLUX)),
            Entry("forecast", partial(forecast_case, FLUX)),
            Entry("predict_l1", partial(predict_l1_case, FLUX)),
            Entry("gram", partial(gram_case, FLUX)),
            Entry("training step", partial(training_step_case, FLUX)),
        ]
        return [*large, *small, Entry("predict_l1", partial(predict_l1_case, SMALL, dtype=torch.float32)), *networks]
    makers: dict[str, Callable[..., Case]] = {
        "predict": predict_case,
        "forecast": forecast_case,
        "predict_l1": predict_l1_case,
        "gram": gram_case,
    }
    large = [Entry(op, partial(make, size)) for size in (FLUX, QWEN) for op, make in makers.items()]
    others = [
        Entry("push", partial(push_case, FLUX)),
        Entry("predict", partial(predict_case, FLUX, dtype=torch.float32)),
        Entry("predict", partial(predict_case, FLUX, dtype=torch.float16)),
        Entry("predict", partial(predict_case, FLUX, count=4)),
        Entry("forecast", partial(forecast_case, FLUX, count=4)),
    ]
    steps = [Entry("training step", partial(training_step_case, FLUX))]
    return [*large, *networks, *steps, *small, *others]

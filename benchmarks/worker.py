"""Measures cases on request, one JSON object a line, for one side of a comparison of two commits.

`{"open": n}` makes and checks case n of the suite and answers `{"title", "variants"}` or `{"title", "error"}`;
`{"round": turn}` answers with the seconds of one sample of each variant.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import lesa_kernels
from benchmarks import harness
from benchmarks.clock import Clock, clock_for
from benchmarks.harness import COPY, Case
from benchmarks.suite import suite


class Side:
    """The case that is open.

    Args:
        clock: of the device.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._case: Case | None = None
        self._calls: dict[str, int] = {}

    def open(self, number: int) -> dict[str, Any]:
        """Make case `number`, keep the variants that this package serves and the copy, and check them."""
        torch.manual_seed(0)
        torch.compiler.reset()
        self._case = None
        entry = suite(self._clock.device)[number]
        # What an older package lacks is answered, not raised.
        try:
            case = entry.make(self._clock)
            own = [variant for variant in case.variants if variant.ours or variant.name == COPY]
            dropped: list[harness.Dropped] = []
            with case.context():
                case, known = harness.prepare(replace(case, variants=own), self._clock, dropped.append)
        except Exception as error:
            return {"title": entry.op, "error": f"{type(error).__name__}: {error}"}
        if dropped:
            return {"title": case.title, "error": "; ".join(each.dropped for each in dropped)}
        self._case, self._calls = case, {name: facts.calls for name, facts in known.items()}
        return {"title": case.title, "variants": list(known)}

    def round(self, turn: int) -> dict[str, float]:
        """Take one sample of each variant."""
        if self._case is None:
            raise RuntimeError("no case is open")
        with self._case.context():
            return harness.one_round(self._case, self._clock, self._calls, turn)


def main() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not come between the answers
    package, tree = Path(lesa_kernels.__file__).resolve(), Path(sys.argv[2]).resolve()
    if not package.is_relative_to(tree):
        sys.exit(f"{tree} must hold the package, got {package}")
    side = Side(clock_for(torch.device(sys.argv[1])))
    for line in sys.stdin:
        request = json.loads(line)
        answer = side.open(request["open"]) if "open" in request else side.round(request["round"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

"""Faults that the engine `host` must report; test_sanitized.py runs them, each in a process that is to fail."""

from __future__ import annotations

import numpy as np
from arrays import Array, contiguous, filled, row_major
from engines import Engine, integers


def test_one_element_too_far(engine: Engine) -> None:
    source = filled(contiguous((100,), "float32"), np.random.default_rng(0))
    short = Array(source.storage[:99].copy(), 0, (100,), row_major((100,)), "float32")
    engine.call("run_copy", "float32", "float32", 1, integers((100,)), engine.views([short, source]))


def test_a_vector_at_an_odd_address(engine: Engine) -> None:
    engine.call("run_misaligned_load", engine.pointer(contiguous((16,), "float32")))


def test_a_barrier_that_one_warp_misses(engine: Engine) -> None:
    engine.call("run_partial_barrier")


def test_a_shuffle_that_one_lane_misses(engine: Engine) -> None:
    engine.call("run_partial_shuffle")

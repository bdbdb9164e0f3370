"""Ops from many threads at once, in child processes, and under torch's modes: the same bits as alone."""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lesa_kernels.ops import OPS as OPS_OF_THE_PACKAGE

ELEMENTS = 100_003
THREADS = 8
ROUNDS = 20


def _numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _into(seed: int) -> list[Tensor]:
    ring = _numbers(5, ELEMENTS, seed=seed, dtype=torch.bfloat16)
    torch.ops.lesa.forecast_into(ring, _numbers(2, 3, seed=1), _numbers(2, seed=2), [0, 1, 2], [2, 4])
    torch.ops.lesa.push(ring, _numbers(ELEMENTS, seed=seed), 0)
    return [ring]


def _trained(seed: int) -> list[Tensor]:
    history = list(_numbers(4, ELEMENTS, seed=seed))
    parameters = [_numbers(length, seed=5).requires_grad_() for length in (4, 1, 1)]
    with torch.enable_grad():
        torch.ops.lesa.predict(history, *parameters).sum().backward()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [*gradients, *torch.ops.lesa.predict_l1(history, history[0], *(p.detach() for p in parameters), None)]


OPS: dict[str, Callable[[int], list[Tensor]]] = {
    "forecast_into, push": _into,
    "predict, backward, predict_l1": _trained,
    "gram": lambda seed: [torch.ops.lesa.gram(list(_numbers(6, ELEMENTS, seed=seed)))],
}


def _same(got: list[Tensor], want: list[Tensor]) -> bool:
    return len(got) == len(want) and all(map(torch.equal, got, want))


@pytest.mark.parametrize("name", OPS)
def test_threads_do_not_disturb_each_other(name: str) -> None:
    op = OPS[name]
    alone = [op(seed) for seed in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(ROUNDS):
            assert all(map(_same, pool.map(op, range(THREADS)), alone))


@pytest.mark.parametrize("op", OPS_OF_THE_PACKAGE)
def test_every_op_computes_the_same_in_many_threads(op: str) -> None:
    """Large enough that an op takes several threads itself, where torch has them."""

    def run(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        arguments = OPS_OF_THE_PACKAGE[op].example(lambda *shape: torch.randn(shape, generator=generator), (60_001,))
        results = tree_leaves([getattr(torch.ops.lesa, op)(*arguments), arguments])
        return [result for result in results if isinstance(result, Tensor)]

    alone = [run(seed) for seed in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(ROUNDS):
            assert all(map(_same, pool.map(run, range(THREADS)), alone))


class Alarm(BaseException):
    """What a signal raises, as Ctrl-C raises KeyboardInterrupt."""


@pytest.fixture
def alarm() -> Iterator[Callable[[float], None]]:
    """Raises Alarm after some seconds."""

    def ring(number: int, frame: Any) -> None:
        raise Alarm

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda delay: (signal.setitimer(signal.ITIMER_REAL, delay), None)[1]
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_an_interrupted_op_has_written_all_or_nothing(alarm: Callable[[float], None]) -> None:
    elements = 2_000_000
    one, none = torch.ones(1, 1), torch.zeros(1)
    interrupted = unnoticed = 0
    for attempt in range(20):
        for write in (
            lambda ring: torch.ops.lesa.push(ring, torch.ones(()).expand(elements), 1),
            lambda ring: torch.ops.lesa.forecast_into(ring, one, none, [0], [1]),
        ):
            ring = torch.stack([torch.ones(elements), torch.zeros(elements)])
            version = ring._version
            alarm(1e-4 + attempt * 1.5e-4)
            try:
                write(ring)
                alarm(0)
            except Alarm:
                interrupted += 1
            least, most = ring[1].aminmax()
            assert least == most
            unnoticed += bool(most) and ring._version == version
    # Between the write and the note of it lies a microsecond.
    assert interrupted > 5 and unnoticed <= 1


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    # Of predict the test takes gradients, which inference mode does not keep.
    [(name, mode) for name in OPS for mode in MODES if not (name.startswith("predict") and mode == "inference_mode")],
)
def test_modes_change_no_bit(name: str, mode: str) -> None:
    alone = OPS[name](0)
    with MODES[mode]():
        assert _same(OPS[name](0), alone)


def _digests() -> list[list[str]]:
    tensors = [[tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in op(0)] for op in OPS.values()]
    return [[hashlib.sha256(tensor.numpy()).hexdigest() for tensor in each] for each in tensors]


def _in_child(results: Any) -> None:
    # torch's own threads do not survive a fork: a child of a process that used them must do without.
    torch.set_num_threads(1)
    results.put(_digests())


def _compare_with_child(method: str) -> None:
    context = multiprocessing.get_context(method)
    results = context.Queue()
    want = _digests()
    child = context.Process(target=_in_child, args=(results,))
    child.start()
    try:
        assert results.get(timeout=60) == want
        child.join(10)
        assert child.exitcode == 0
    finally:
        child.kill()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_computes_the_same_bits(method: str) -> None:
    # In an interpreter of its own: a fork takes the locks along that threads of other tests may hold.
    code = [sys.executable, __file__, method]
    result = subprocess.run(code, capture_output=True, text=True, timeout=180, check=False)
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":
    _compare_with_child(sys.argv[1])

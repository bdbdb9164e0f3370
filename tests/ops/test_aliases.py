"""Ops that write, called with views of what they write: right, or refused with nothing changed, as by `Tensor.copy_`.

Each argument that is read becomes in turn a view of the memory that is written: other strides, starts and dtypes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from op_inputs import random, valid_arguments
from torch import Tensor

from lesa_kernels.ops import OPS
from lesa_kernels.ops.contract import share_memory

ops = torch.ops.lesa
View = Callable[[Tensor], Tensor]
WRITING = [name for name, op in OPS.items() if any(a.alias_info and a.alias_info.is_write for a in op.arguments)]
# Multiples of 16: tiles of kernels. 129: rows that are read in place.
FEATURES: list[Any] = [(), (1, 1), (3, 3), (16, 16), (17, 5), (32, 32), (2, 129)]
FEATURES.append(pytest.param((256, 256), marks=pytest.mark.exhaustive))
READ_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]

WRITTEN: dict[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "contiguous": lambda memory, shape: memory[: math.prod(shape)].view(shape),
    "the first dimension last": lambda memory, shape: (
        memory[: math.prod(shape)].view(*shape[1:], *shape[:1]).movedim(-1, 0) if shape else memory[0]
    ),
    "in reverse order": lambda memory, shape: (
        memory[: math.prod(shape)].view(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
    ),
    "every second": lambda memory, shape: memory[: 2 * math.prod(shape)].view(*shape, 2)[..., 0],
}


def _strides(shape: tuple[int, ...], ring: Tensor) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Strides of a view, by name; of some, elements share memory."""
    rows = torch.empty(shape, device="meta").stride()
    if len(shape) == ring.dim() - 1:
        yield "as a slot", ring.stride()[1:]
    yield "rows", rows
    yield "reversed", torch.empty(shape[::-1], device="meta").stride()[::-1]
    yield "every second", tuple(2 * stride for stride in rows)
    yield "expanded", (0,) * len(shape)
    yield "one row", (*(0,) * (len(shape) - 1), 1)[-len(shape) :] if shape else ()
    yield "diagonals", (1,) * len(shape)


def _views(shape: tuple[int, ...], written: Tensor, size: int) -> Iterator[tuple[str, View]]:
    """Views of a shape of a memory of some elements."""
    slot = written.stride(0) if written.dim() else 1
    for dtype in READ_DTYPES if written.is_cpu else READ_DTYPES[:3]:
        for name, strides in _strides(shape, written):
            reach = 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
            for start in sorted({0, 1, 2, slot, slot + 1, 2 * slot, written.numel()}):
                if (start + reach) * dtype.itemsize <= size * written.element_size():
                    yield (
                        f"{dtype}, {name}, from {start}",
                        lambda memory, dtype=dtype, strides=strides, start=start: memory.view(dtype).as_strided(
                            shape, strides, start
                        ),
                    )


def _set(arguments: Sequence[Any], place: tuple[int, ...], value: Tensor) -> list[Any]:
    """Replace an argument, or one of a list."""
    changed = [list(each) if isinstance(each, list) else each for each in arguments]
    if len(place) == 1:
        changed[place[0]] = value
    else:
        changed[place[0]][place[1]] = value
    return changed


def _tensors(arguments: tuple[Any, ...]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """The tensors of a call and where they stand: a position, or two of a list; of a list, the first and last."""
    for position, value in enumerate(arguments):
        if isinstance(value, Tensor):
            yield (position,), value
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            yield from (((position, k), value[k]) for k in (0, len(value) - 1))


def _memory(size: int) -> Tensor:
    """Elements whose halves are small float16 and bfloat16 numbers, so that sums are finite in every dtype."""
    return torch.randint(0x3C00, 0x3F00, (2 * size,), dtype=torch.int16).view(torch.float32)


def _calls(
    op: str, layout: str, feature: tuple[int, ...]
) -> Iterator[tuple[str, Tensor, Callable[[Tensor, Tensor], Any]]]:
    """Calls with one argument a view: name, content of the memory, what calls with memories to write and to read."""
    arguments = valid_arguments(torch.float32, grad=False, feature=feature)[op]
    (place,) = [k for k, argument in enumerate(OPS[op].arguments) if argument.alias_info]
    shape = tuple(arguments[place].shape)
    content = _memory(4 * math.prod(shape) + 64)
    for at, value in _tensors(arguments):
        if at == (place,):
            continue
        for name, view in _views(tuple(value.shape), WRITTEN[layout](content, shape), content.numel()):

            def call(written: Tensor, read: Tensor, at: tuple[int, ...] = at, view: View = view) -> Any:
                views = WRITTEN[layout](written, shape), view(read)
                shared = share_memory(*views)
                changed = _set(_set(arguments, (place,), views[0]), at, views[1])
                try:
                    return shared, getattr(ops, op)(*changed), None
                except RuntimeError as error:
                    return shared, None, str(error)

            yield f"argument {at}, {name}", content, call


@pytest.mark.parametrize("feature", FEATURES, ids=str)
@pytest.mark.parametrize("layout", WRITTEN)
@pytest.mark.parametrize("op", WRITING)
def test_views_of_what_is_written_are_read_right_or_refused(op: str, layout: str, feature: tuple[int, ...]) -> None:
    taken = refused = 0
    for name, content, call in _calls(op, layout, feature):
        memory, other = content.clone(), content.clone()
        shared, results, refusal = call(memory, memory)
        if refusal is None:
            _, wanted, _ = call(other, content)
            torch.testing.assert_close(results, wanted, equal_nan=True)
            assert torch.allclose(memory, other, rtol=1e-6, atol=0, equal_nan=True), f"{name}: written wrongly"
            taken += 1
        else:
            assert refusal.startswith(f"lesa::{op}: ") and (shared or "memory" not in refusal), name
            assert torch.equal(memory.view(torch.int32), content.view(torch.int32)), f"{name}: refused, yet written"
            refused += 1
    assert taken and refused


def _bytes_of(tensor: Tensor, memory: Tensor) -> Tensor:
    """Which bytes of a memory a tensor has, found by writing to them."""
    marks = torch.zeros(memory.nbytes, dtype=torch.uint8)
    if tensor.numel():
        strides = [stride * tensor.element_size() for stride in tensor.stride()]
        shape, start = (*tensor.shape, tensor.element_size()), tensor.data_ptr() - memory.data_ptr()
        marks.as_strided(shape, (*strides, 1), start).fill_(1)
    return marks.bool()


def test_memory_in_common_is_found_exactly() -> None:
    torch.manual_seed(0)
    memory = torch.zeros(400)
    answers = [0, 0]
    for _ in range(3000):
        pair = []
        for _ in range(2):
            flat = memory.view(READ_DTYPES[int(torch.randint(4, ()))])
            if torch.rand(()) < 0.5:
                shape = torch.randint(0, 5, (int(torch.randint(4, ())),)).tolist()
                pair.append(
                    flat.as_strided(shape, torch.randint(8, (len(shape),)).tolist(), int(torch.randint(20, ())))
                )
            else:
                view = flat[:120].view(4, 5, 6).permute(torch.randperm(3).tolist())
                for d in range(3):
                    first = int(torch.randint(view.shape[d], ()))
                    view = view.narrow(d, first, int(torch.randint(1, view.shape[d] - first + 1, ())))
                pair.append(view[..., :: int(torch.randint(1, 3, ()))])
        first, second = (_bytes_of(tensor, memory) for tensor in pair)
        common = bool((first & second).any())
        assert share_memory(*pair) == share_memory(*pair[::-1]) == common
        answers[common] += 1
    assert min(answers) > 300


def test_a_layout_that_takes_long_to_search_counts_as_shared() -> None:
    memory = torch.zeros(2_000_000)
    strange = [memory.as_strided((300, 300, 300), (2, 7, 11), start) for start in (0, 1)]
    assert share_memory(*strange)


def test_push_of_a_transposed_slot_is_refused() -> None:
    for n in (2, 16, 64):
        ring = random(3, n, n, grad=False)
        before = ring.clone()
        with pytest.raises(RuntimeError, match="feature must be the slot that it is written to or share no memory"):
            ops.push(ring, ring[0].t(), 0)
        assert torch.equal(ring, before)
        ops.push(ring, ring[1].t(), 0)
        assert torch.equal(ring[0], before[1].t())

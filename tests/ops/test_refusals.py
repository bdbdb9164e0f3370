"""What an op cannot take is a RuntimeError in the same words on every floor.

Wrong calls are built from valid ones: every argument in turn is left out, or gets another count, shape, dtype, device,
layout, slot or memory. Each is made twice: to the checks in Python, which stand before references, fakes and Triton's
launchers, and to the compiled library by its key of the dispatcher. csrc/contract.h is one header for both libraries,
the CPU's and that of CUDA, whose entries take tensors on a GPU only: where there is one, they are compared as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from op_inputs import valid_arguments
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from lesa_kernels.ops import OPS

Change = Callable[[Tensor], Any]


def _with_last(size: int) -> Change:
    """Change the last dimension by some elements; a size of 0 empties it."""

    def change(tensor: Tensor) -> Tensor:
        last = tensor.shape[-1] if tensor.dim() else 1
        return tensor.new_zeros((*tensor.shape[:-1], last + size if size else 0))

    return change


OTHER_DTYPES = [
    torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.uint16, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
# In place of one tensor. What leaves a call valid must be taken by both.
OF_TENSORS: dict[str, Change] = {
    "None": lambda tensor: None,
    **{str(dtype): lambda tensor, dtype=dtype: tensor.to(dtype) for dtype in OTHER_DTYPES},
    "meta": lambda tensor: tensor.to("meta"),
    "a dimension more": lambda tensor: tensor.unsqueeze(0),
    "two dimensions more": lambda tensor: tensor[None, None],
    "flat": lambda tensor: tensor.reshape(-1),
    "0-d": lambda tensor: tensor.new_zeros(()),
    "an element more": _with_last(1),
    "seventy elements more": _with_last(70),
    "an element fewer": _with_last(-1),
    "empty": _with_last(0),
}
# These reach the checks in Python through the dispatcher, whichever library is loaded. Torch refuses nested itself.
LAYOUTS: dict[str, Change] = {
    "sparse": lambda tensor: tensor.to_sparse(),
    "csr": lambda tensor: tensor.reshape(-1, tensor.numel()).to_sparse_csr(),
    "quantized": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
}
OF_LISTS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "no tensors": lambda tensors: [],
    "65 tensors": lambda tensors: [tensors[0]] * 65,
    "one tensor more": lambda tensors: [*tensors, tensors[0]],
    "one tensor fewer": lambda tensors: tensors[1:],
}
OF_SLOTS: dict[str, Callable[[list[int]], list[int]]] = {
    "no slots": lambda slots: [],
    "65 slots": lambda slots: slots[:1] * 65,
    "one slot more": lambda slots: [*slots, 0],
    "one slot fewer": lambda slots: slots[1:],
    "a slot twice": lambda slots: [*slots[:-1], slots[0]],
    **{f"slot {slot}": lambda slots, slot=slot: [*slots[:-1], slot] for slot in (-1, 5, 2**40, -(2**63))},
    **{f"first slot {slot}": lambda slots, slot=slot: [slot, *slots[1:]] for slot in (-1, 5, 2**63 - 1)},
}
WRONG_SLOTS = (-1, 5, 2**31, 2**63 - 1, -(2**63))


def _changes(value: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What an argument becomes, by name; made when it is called."""
    if isinstance(value, Tensor):
        yield from ((name, lambda change=change: change(value)) for name, change in (OF_TENSORS | LAYOUTS).items())
    elif isinstance(value, list) and isinstance(value[0], Tensor):
        yield from ((name, lambda change=change: change(value)) for name, change in OF_LISTS.items())
        for k in (0, len(value) - 1):
            for name, change in (OF_TENSORS | LAYOUTS).items():
                if name != "None":  # torch's parser takes no such list
                    yield f"[{k}] {name}", lambda k=k, change=change: [*value[:k], change(value[k]), *value[k + 1 :]]
    elif isinstance(value, list):
        yield from ((name, lambda change=change: change(value)) for name, change in OF_SLOTS.items())
    elif not isinstance(value, bool):
        yield from ((f"slot {slot}", lambda slot=slot: slot) for slot in WRONG_SLOTS)


def _shared_memory() -> Iterator[tuple[str, str, tuple[Any, ...]]]:
    """Calls whose memory overlaps: op, what overlaps, arguments."""
    memory, one = torch.zeros(40), torch.ones(1)
    rows, offsets = torch.zeros(2, 3), torch.zeros(2)
    rings = {
        "expanded": torch.zeros(1, 2, 3).expand(4, 2, 3),
        "unfolded": torch.zeros(9).unfold(0, 6, 1).view(4, 6)[:, :6].unflatten(1, (2, 3)),
    }
    for name, ring in rings.items():
        yield "push", f"ring {name}", (ring, torch.ones(2, 3), 0)
        yield "forecast_into", f"ring {name}", (ring, rows, offsets, [0, 1, 2], [3, 1])
    ring = memory[:24].view(4, 2, 3)
    for start in (7, 10, 13, 17):
        yield "push", f"feature {start}", (ring, memory[start : start + 6].view(2, 3), 2)
        moved = memory[start : start + 6].view(3, 2).t()
        yield "push", f"feature {start}, both transposed", (memory[:24].view(4, 3, 2).transpose(1, 2), moved, 2)
    for start in (0, 2, 20):
        yield "forecast_into", f"coefficients {start}", (ring, memory[start : start + 6].view(2, 3), offsets,
                                                         [0, 1, 2], [3, 1])  # fmt: skip
        yield "forecast_into", f"offsets {start}", (ring, rows, memory[start : start + 2], [0, 1, 2], [3, 1])
    layouts: dict[str, Callable[[int], Tensor]] = {
        "contiguous": lambda start: memory[start : start + 12].view(3, 4),
        "transposed": lambda start: memory[start : start + 12].view(4, 3).t(),
        "with gaps": lambda start: memory[start : start + 24].view(3, 8)[:, ::2],
    }
    for name, make in layouts.items():
        others = [torch.zeros(3, 4), torch.zeros(3, 4)]
        for start in (0,) if name == "with gaps" else (0, 4, 8):
            out, same = make(4), make(start) if start else make(4)
            yield "predict_l1", f"out and history {name} {start}", ([others[0], same], others[1], torch.ones(2), one,
                                                                   one, out)  # fmt: skip
            yield "predict_l1", f"out and target {name} {start}", (others, same, torch.ones(2), one, one, out)
    yield "predict_l1", "out expanded", ([torch.zeros(3)], torch.zeros(3), one, one, one, torch.zeros(1).expand(3))
    for k, name in enumerate(("weight", "bias", "gain")):
        parameters = [one, one, one]
        parameters[k] = memory[2:3]
        yield "predict_l1", f"out and {name}", ([torch.zeros(3)], torch.zeros(3), *parameters, memory[:3])


def _calls(op: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """All changed calls of an op, by what was changed."""
    valid = valid_arguments(torch.float32, grad=False)[op]
    for position, argument in enumerate(OPS[op].arguments):
        for name, make in _changes(valid[position]):
            with suppress(RuntimeError, NotImplementedError):  # torch has not every layout of every tensor and device
                yield f"{argument.name}: {name}", (*valid[:position], make(), *valid[position + 1 :])
    yield from ((name, arguments) for of, name, arguments in _shared_memory() if of == op)


def _refusal(call: Callable[..., Any], arguments: tuple[Any, ...]) -> str | None:
    """The words of a refusal; None where there is none."""
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)
    return None


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_quantized


def _refusals(op: str) -> Iterator[tuple[str, str, str | None]]:
    """Every call that Python refuses: what was changed, Python's words, the library's."""
    overload = getattr(torch.ops.lesa, op).default
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, torch.get_default_device().type.upper()))
    check = OPS[op].checked(lambda *_: None)
    for name, arguments in _calls(op):
        tensors = [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]
        call = partial(overload.redispatch, key) if all(map(_is_dense, tensors)) else overload
        in_python = _refusal(check, arguments)
        if in_python is not None:
            yield name, in_python, _refusal(call, arguments)
        elif not any(tensor.is_meta for tensor in tensors):
            assert _refusal(call, arguments) is None, f"{op}, {name}: the library refuses what Python takes"


@pytest.fixture
def _compiled(device: torch.device) -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key("lesa::predict", device.type.upper()):
        pytest.skip(f"no compiled library serves {device.type}: there is nothing to compare with")


@pytest.mark.usefixtures("_compiled")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on layouts that it is still working on
@pytest.mark.parametrize("op", OPS)
def test_both_refuse_in_the_same_words(op: str) -> None:
    refusals = list(_refusals(op))
    assert refusals
    for name, in_python, compiled in refusals:
        assert in_python.startswith(f"lesa::{op}: "), name
        assert compiled == in_python, name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_more_than_200_wrong_calls_are_compared() -> None:
    names = [name for op in OPS for name, *_ in _refusals(op)]
    assert sum(not name.endswith(tuple(LAYOUTS)) for name in names) >= 200


KAN = (torch.randn(2, 3), torch.randn(3, 12), torch.randn(4, 3), torch.randn(4, 3, 8), torch.randn(4, 3))
H = [torch.randn(2, 3) for _ in range(3)]
W, B, G = torch.randn(3), torch.randn(1), torch.randn(1)
RING, ROWS, OFFSETS = torch.randn(4, 2, 3), torch.randn(2, 3), torch.randn(2)
WORDS: list[tuple[str, tuple[Any, ...], str]] = [
    ("predict", ([], W, B, G), r"lesa::predict: history must hold 1 to 64 tensors, got 0"),
    ("predict", (H * 22, W, B, G), r"lesa::predict: history must hold 1 to 64 tensors, got 66"),
    ("predict", ([*H[:2], torch.randn(2, 4)], W, B, G), r"history\[2\] must have shape \(2, 3\) like .*, got \(2, 4\)"),
    ("predict", ([*H[:2], H[2].double()], W, B, G), r"history\[2\] must have dtype float32 like .*, got float64"),
    ("predict", ([h.int() for h in H], W, B, G), r"history\[0\] must have a dtype of float32, .*got int32"),
    ("predict", (H, torch.randn(4), B, G), r"weight must have shape \(3,\), got \(4,\)"),
    ("predict", (H, W, torch.randn(2), G), r"bias must hold one element, got shape \(2,\)"),
    ("predict", (H, W, B, G.double()), r"gain must have dtype float32.*got float64"),
    ("predict", ([h.half() for h in H], W.bfloat16(), B, G), r"weight must .* float32 or float16.*got bfloat16"),
    ("predict_backward", (torch.randn(3), H, W, B, G, True), r"grad must have shape \(2, 3\) like .*, got \(3,\)"),
    ("predict_l1", (H, torch.randn(3), W, B, G, None), r"target must have shape \(2, 3\)"),
    ("predict_l1", (H, H[0], W, B, G, torch.randn(2)), r"out must have shape \(2, 3\)"),
    ("forecast", (H, torch.randn(2, 4), OFFSETS), r"lesa::forecast: coefficients must have shape \(M, 3\), got \(2"),
    ("forecast", (H, torch.randn(65, 3), torch.randn(65)), r"coefficients must have 1 to 64 rows, got 65"),
    ("forecast", (H, ROWS, torch.randn(3)), r"offsets must have shape \(2,\), got \(3,\)"),
    ("forecast_into", (torch.tensor(1.0), ROWS, OFFSETS, [0], [0]), r"ring must have shape \(slots, \*feature\), got"),
    ("forecast_into", (RING, ROWS, OFFSETS, [0, 1, 4], [0, 1]), r"read\[2\] must be a slot in \[0, 4\), got 4"),
    ("forecast_into", (RING, ROWS, OFFSETS, [0, 1, 2], [-1, 1]), r"write\[0\] must be a slot in \[0, 4\), got -1"),
    ("forecast_into", (RING, ROWS, OFFSETS, [0, 1, 2], [3, 3]), r"write must name distinct slots, got slot 3 twice"),
    ("forecast_into", (RING, ROWS, OFFSETS, [0, 1, 2], [3]), r"write must name 2 slots"),
    ("forecast_into", (RING, ROWS, OFFSETS, [], [3, 1]), r"read must name 1 to 64 slots, got 0"),
    ("push", (RING, torch.randn(3, 2), 0), r"feature must have shape \(2, 3\) like a slot of ring, got \(3, 2\)"),
    ("push", (RING, torch.randn(2, 3), 4), r"slot must be a slot in \[0, 4\), got 4"),
    ("push", (RING, torch.ones(2, 3, dtype=torch.int64), 0), r"feature must have a dtype of float32.*got int64"),
    ("gram", ([],), r"lesa::gram: features must hold 1 to 64 tensors, got 0"),
    ("gram", (H * 22,), r"lesa::gram: features must hold 1 to 64 tensors, got 66"),
    ("gram", ([*H[:2], torch.randn(2, 4)],), r"features\[2\] must have shape \(2, 3\) like .*, got \(2, 4\)"),
    ("gram", ([H[0], H[1].half()],), r"features\[1\] must have dtype float32 like .*, got float16"),
    ("gram", ([h.int() for h in H],), r"features\[0\] must have a dtype of float32, .*got int32"),
    ("kan_linear", (torch.randn(2, 3), torch.randn(3, 12), torch.randn(4, 2), torch.randn(4, 3, 8), torch.randn(4, 3)),
     r"base_weight must have shape \(outputs, 3\), got \(4, 2\)"),
    ("kan_linear_backward", (torch.randn(2, 3), *KAN), r"grad must have shape \(2, 4\), got \(2, 3\)"),
    ("kan_linear_backward", (torch.randn(2, 4).half(), *KAN), r"grad must have dtype float32 like x, got float16"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "arguments", "message"), WORDS, ids=[f"{w[0]}-{i}" for i, w in enumerate(WORDS)])
def test_a_refusal_says_what_is_required_and_what_came(
    op: str, arguments: tuple[Any, ...], message: str, device: torch.device
) -> None:
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)
    for call in (getattr(torch.ops.lesa, op), OPS[op].checked(OPS[op].reference)):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)


def test_float64_features_are_for_the_cpu_only() -> None:
    features = [torch.zeros(3, dtype=torch.float64, device="meta")]
    with pytest.raises(RuntimeError, match="must have a dtype of float32, float16, bfloat16, got float64"):
        torch.ops.lesa.gram(features)


def test_a_feature_may_be_its_slot() -> None:
    ring = torch.randn(4, 2, 3)
    before = ring.clone()
    torch.ops.lesa.push(ring, ring[2], 2)
    assert torch.equal(ring, before)


def test_an_error_changes_nothing() -> None:
    ring = torch.randn(4, 2, 3)
    before = ring.clone()
    with pytest.raises(RuntimeError):
        torch.ops.lesa.forecast_into(ring, torch.randn(2, 3), torch.randn(2), [0, 1, 2], [3, 9])
    assert torch.equal(ring, before)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("op", OPS)
def test_versions_move_with_what_is_written_and_not_with_what_is_refused(op: str) -> None:
    refused = 0
    for name, arguments in _calls(op):
        tensors = [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]
        before = [tensor._version for tensor in tensors]
        refusal = _refusal(getattr(torch.ops.lesa, op), arguments)
        written = [arguments[position] for position, _ in OPS[op].written if refusal is None]
        for tensor, version in zip(tensors, before, strict=True):
            assert tensor._version == version + any(tensor is each for each in written), name
        refused += refusal is not None
    assert refused

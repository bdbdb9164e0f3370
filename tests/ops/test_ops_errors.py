"""What an op cannot take is an error that names the op, the argument, what is required and what came."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lesa_kernels.ops import OPS

reference = SimpleNamespace(**{name: op.checked(op.reference) for name, op in OPS.items()})

KAN = (torch.randn(2, 3), torch.randn(3, 12), torch.randn(4, 3), torch.randn(4, 3, 8), torch.randn(4, 3))
H = [torch.randn(2, 3) for _ in range(3)]
W, B, G = torch.randn(3), torch.randn(1), torch.randn(1)
RING, ROWS, OFFSETS = torch.randn(4, 2, 3), torch.randn(2, 3), torch.randn(2)


CASES: list[tuple[str, tuple[Any, ...], str]] = [
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


@pytest.mark.parametrize(("op", "arguments", "message"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_a_wrong_argument_is_named(op: str, arguments: tuple[Any, ...], message: str, device: torch.device) -> None:
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to(device), arguments)
    for call in (getattr(torch.ops.lesa, op), getattr(reference, op)):
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)


@pytest.mark.parametrize("kind", ["expanded", "unfolded"])
def test_a_ring_that_overlaps_itself_is_refused(kind: str) -> None:
    rings = {
        "expanded": torch.zeros(1, 2, 3).expand(4, 2, 3),
        "unfolded": torch.zeros(9).unfold(0, 6, 1).view(4, 6)[:, :6].unflatten(1, (2, 3)),
    }
    ring, rows, offsets = rings[kind], torch.randn(2, 3), torch.randn(2)
    for module in (torch.ops.lesa, reference):
        with pytest.raises(RuntimeError, match="ring must not overlap itself in memory"):
            module.push(ring, torch.ones(2, 3), 0)
        with pytest.raises(RuntimeError, match="ring must not overlap itself in memory"):
            module.forecast_into(ring, rows, offsets, [0, 1, 2], [3, 1])


def test_a_feature_that_overlaps_a_part_of_its_slot_is_refused() -> None:
    memory = torch.arange(30.0)
    before, ring = memory.clone(), memory[:24].view(4, 2, 3)
    for module in (torch.ops.lesa, reference):
        with pytest.raises(RuntimeError, match="feature must not overlap a part of the slot"):
            module.push(ring, memory[14:20].view(2, 3), 2)
        module.push(ring, ring[2], 2)
        assert torch.equal(memory, before)


def test_an_error_changes_nothing() -> None:
    ring = torch.randn(4, 2, 3)
    before = ring.clone()
    with pytest.raises(RuntimeError):
        torch.ops.lesa.forecast_into(ring, torch.randn(2, 3), torch.randn(2), [0, 1, 2], [3, 9])
    assert torch.equal(ring, before)


def test_a_meta_tensor_is_refused_where_it_is_mixed_with_real_ones() -> None:
    with pytest.raises(RuntimeError, match=r"must be on"):
        reference.predict([*H[:2], H[2].to("meta")], W, B, G)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "with gaps"])
def test_what_is_written_may_not_be_an_input_as_well(layout: str) -> None:
    make = {
        "contiguous": lambda: torch.randn(3, 4),
        "transposed": lambda: torch.randn(4, 3).T,
        "with gaps": lambda: torch.randn(3, 8)[:, ::2],
    }[layout]
    history, target = [make(), make()], make()
    for module in (torch.ops.lesa, reference):
        for out, name in ((history[1], r"history\[1\]"), (target, "target")):
            before = out.clone()
            with pytest.raises(RuntimeError, match=f"out must not share memory with {name}"):
                module.predict_l1(history, target, torch.randn(2), torch.randn(1), torch.randn(1), out)
            assert torch.equal(out, before)

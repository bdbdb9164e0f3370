"""Calls of the ops for hypothesis: valid arguments, of which a few are then changed, some for the worse."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from op_inputs import DTYPES, LAYOUTS
from torch import Tensor

from lesa_kernels.ops import OPS

Draw = Callable[[st.SearchStrategy[Any]], Any]

SHAPES = [(3,), (), (0,), (2, 5), (2, 3, 17), (2, 0, 4), (1030,)]
HUGE = [-1, 64, 2**31, -(2**31) - 1, 2**63 - 1, -(2**63), 2**63, 10**30]
# In place of any argument: nothing of this is a tensor, a list of tensors or a list of slots.
WRONG_TYPES: list[Any] = [None, "slot", 3.5, object(), {}, [None], [[]], b"", np.ones(3), 1j]
SPECIAL = [float("nan"), float("inf"), -float("inf"), 1e30, -1e-40, -0.0]
OTHER_DTYPES = [*DTYPES, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.int8, torch.float8_e4m3fn]


class Subclass(Tensor):
    """A tensor of a class of its own."""


@dataclass
class Call:
    """A call of an op.

    Args:
        op: its name.
        arguments: by name.
        changes: what was done to them, in words; a change that leaves the call valid is not among them.
        kept: whatever the arguments' memory belongs to.
    """

    op: str
    arguments: dict[str, Any]
    changes: list[str] = field(default_factory=list)
    kept: list[Any] = field(default_factory=list)


def _numbers(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return draw(st.sampled_from(LAYOUTS))(shape, dtype)


def _history(draw: Draw, dtype: torch.dtype) -> list[Tensor]:
    shape, count = draw(st.sampled_from(SHAPES)), draw(st.sampled_from([1, 2, 3, 9]))
    return [_numbers(draw, shape, dtype) for _ in range(count)]


def _parameters(draw: Draw, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    own = draw(st.sampled_from([torch.float32, dtype]))
    return [_numbers(draw, shape, own) for shape in shapes]


def _slots(draw: Draw, count: int, most: int, distinct: bool = False) -> list[int]:
    return draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=most, unique=distinct))


def _weighted(draw: Draw) -> dict[str, Any]:
    dtype = draw(st.sampled_from(DTYPES))
    history = _history(draw, dtype)
    weight, bias, gain = _parameters(draw, dtype, (len(history),), (1,), ())
    return {"history": history, "weight": weight, "bias": bias, "gain": gain}


def predict(draw: Draw) -> dict[str, Any]:
    return _weighted(draw)


def predict_backward(draw: Draw) -> dict[str, Any]:
    weighted = _weighted(draw)
    grad = torch.randn_like(weighted["history"][0])
    return {"grad": grad, **weighted, "history_needs_grad": draw(st.booleans())}


def predict_l1(draw: Draw) -> dict[str, Any]:
    weighted = _weighted(draw)
    history = weighted.pop("history")
    target = _numbers(draw, tuple(history[0].shape), history[0].dtype)
    out = torch.empty(history[0].shape, dtype=history[0].dtype).fill_(7) if draw(st.booleans()) else None
    return {"history": history, "target": target, **weighted, "out": out}


def forecast(draw: Draw) -> dict[str, Any]:
    dtype, rows = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 2, 7]))
    history = _history(draw, dtype)
    coefficients, offsets = _parameters(draw, dtype, (rows, len(history)), (rows,))
    return {"history": history, "coefficients": coefficients, "offsets": offsets}


def _ring(draw: Draw, shapes: list[tuple[int, ...]]) -> Tensor:
    return torch.randn(draw(st.integers(1, 5)), *draw(st.sampled_from(shapes)), dtype=torch.float64).to(
        draw(st.sampled_from(DTYPES))
    )


def forecast_into(draw: Draw) -> dict[str, Any]:
    ring = _ring(draw, SHAPES)
    read, write = _slots(draw, len(ring), 9), _slots(draw, len(ring), 4, distinct=True)
    coefficients, offsets = _parameters(draw, ring.dtype, (len(write), len(read)), (len(write),))
    return {"ring": ring, "coefficients": coefficients, "offsets": offsets, "read": read, "write": write}


def push(draw: Draw) -> dict[str, Any]:
    ring = _ring(draw, SHAPES)
    feature = _numbers(draw, tuple(ring.shape[1:]), draw(st.sampled_from(DTYPES)))
    return {"ring": ring, "feature": feature, "slot": draw(st.integers(0, len(ring) - 1))}


def gram(draw: Draw) -> dict[str, Any]:
    return {"features": _history(draw, draw(st.sampled_from(DTYPES)))}


def kan_linear(draw: Draw) -> dict[str, Any]:
    dtype, order = draw(st.sampled_from(DTYPES)), draw(st.integers(0, 3))
    rows, ins, outs, bases = (draw(st.sampled_from(sizes)) for sizes in ([(3,), (), (0,)], [1, 4], [1, 5], [1, 4]))
    grid = torch.arange(bases + order + 1.0).expand(ins, -1).contiguous() - 1
    own = draw(st.sampled_from([torch.float32, dtype]))
    base, spline, scaler = (torch.randn(shape).to(own) for shape in ((outs, ins), (outs, ins, bases), (outs, ins)))
    return {"x": _numbers(draw, (*rows, ins), dtype), "grid": grid.to(own), "base_weight": base,
            "spline_weight": spline, "spline_scaler": scaler}  # fmt: skip


def kan_linear_backward(draw: Draw) -> dict[str, Any]:
    arguments = kan_linear(draw)
    x = arguments["x"]
    return {"grad": _numbers(draw, (*x.shape[:-1], arguments["base_weight"].shape[0]), x.dtype), **arguments}


SPECIAL_CALLS: dict[str, Callable[[Draw], dict[str, Any]]] = {
    each.__name__: each
    for each in (predict, predict_backward, predict_l1, forecast, forecast_into, push, gram,
                 kan_linear, kan_linear_backward)
}  # fmt: skip


def valid(draw: Draw, op: str) -> dict[str, Any]:
    """Arguments by name; those of the op's example where nothing more special is drawn for it."""
    if op in SPECIAL_CALLS:
        return SPECIAL_CALLS[op](draw)
    dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(SHAPES))
    arguments = OPS[op].example(lambda *sizes: _numbers(draw, sizes, dtype), shape)
    return {argument.name: value for argument, value in zip(OPS[op].arguments, arguments, strict=True)}


def _other_shape(draw: Draw, tensor: Tensor, _: Call) -> Tensor:
    kind = draw(st.sampled_from(["more", "fewer", "unsqueezed", "flat", "empty", "none"]))
    shape = list(tensor.shape)
    if kind == "unsqueezed" or not shape:
        return tensor.unsqueeze(0)
    if kind in ("more", "fewer", "empty"):
        shape[draw(st.integers(0, len(shape) - 1))] = {"more": 70, "fewer": max(shape[-1] - 1, 0), "empty": 0}[kind]
        return torch.zeros(shape).to(tensor.dtype)
    return tensor.flatten() if kind == "flat" else torch.zeros(()).to(tensor.dtype)


def _other_dtype(draw: Draw, tensor: Tensor, _: Call) -> Tensor:
    return tensor.to(draw(st.sampled_from(OTHER_DTYPES)))


def _other_layout(draw: Draw, tensor: Tensor, _: Call) -> Any:
    kind = draw(st.sampled_from(["coo", "csr", "quantized", "mkldnn", "meta", "nested"]))
    wide = tensor.float()
    if kind == "coo":
        return tensor.to_sparse()
    if kind == "csr":
        return tensor.reshape(-1, max(tensor.shape[-1], 1) if tensor.dim() else 1).to_sparse_csr()
    if kind == "quantized":
        return torch.quantize_per_tensor(wide, 0.1, 0, torch.qint8)
    if kind == "mkldnn":
        return wide.to_mkldnn()
    return torch.nested.nested_tensor([wide, wide]) if kind == "nested" else tensor.to("meta")


def _special_values(draw: Draw, tensor: Tensor, _: Call) -> Tensor:
    if tensor.is_floating_point() and tensor.numel() and tensor.dtype != torch.float8_e4m3fn:
        tensor = tensor.clone()
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from(SPECIAL))
    return tensor


def _wants_gradient(_: Draw, tensor: Tensor, __: Call) -> Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _own_class(draw: Draw, tensor: Tensor, _: Call) -> Tensor:
    if draw(st.booleans()):
        return torch.nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.as_subclass(Subclass)


def _same_as_another(draw: Draw, tensor: Tensor, call: Call) -> Tensor:
    return draw(st.sampled_from(list(tensors_of(call.arguments.values()))))


def _overlapping(draw: Draw, tensor: Tensor, call: Call) -> Tensor:
    """Lay it over a part of another argument's memory, with strides of its own."""
    others = [other for other in tensors_of(call.arguments.values()) if other.dtype == tensor.dtype]
    other = draw(st.sampled_from([*others, tensor]))
    rows = torch.empty(tensor.shape, device="meta").stride()
    reversed_rows = torch.empty(tensor.shape[::-1], device="meta").stride()[::-1]
    strides = draw(st.sampled_from([rows, reversed_rows, [2 * stride for stride in rows], [0] * tensor.dim()]))
    memory = torch.zeros(other.numel() + 2 * tensor.numel() + 4).to(tensor.dtype)
    at = draw(st.integers(0, other.numel() + 3))
    moved = memory[: other.numel()].view(other.shape)
    moved.copy_(other)
    replace(call, other, moved)
    return memory.as_strided(tensor.shape, strides, at)


def _negated(_: Draw, tensor: Tensor, __: Call) -> Tensor:
    return torch._neg_view(tensor) if tensor.dtype in DTYPES else tensor


def _shared_until_written(_: Draw, tensor: Tensor, call: Call) -> Tensor:
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        return tensor  # torch crashes on copies of such copies
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        return tensor  # another argument may write to the rest, and so to the original
    shared = torch._lazy_clone(tensor)
    call.kept.append((tensor, tensor.clone()))
    return shared


def _read_only(_: Draw, tensor: Tensor, call: Call) -> Tensor:
    if tensor.dtype not in (torch.float32, torch.float64) or not tensor.numel() or tensor is written(call):
        return tensor
    array = tensor.contiguous().numpy().copy()
    array.flags.writeable = False
    call.kept.append(array)
    return torch.from_numpy(array)


def _of_inference_mode(_: Draw, tensor: Tensor, __: Call) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def _with_itself(_: Draw, tensor: Tensor, __: Call) -> Tensor:
    """All elements in one place."""
    return tensor.flatten()[:1].expand(tensor.numel()).view(tensor.shape) if tensor.numel() else tensor


TENSOR_CHANGES: list[Callable[[Draw, Tensor, Call], Any]] = [
    _other_shape, _other_dtype, _other_layout, _special_values, _wants_gradient, _own_class, _same_as_another,
    _overlapping, _negated, _shared_until_written, _read_only, _of_inference_mode, _with_itself,
]  # fmt: skip


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors among arguments, those in lists too."""
    lists = [value if isinstance(value, list) else [value] for value in values]
    return [each for each in itertools.chain(*lists) if isinstance(each, Tensor)]


def written(call: Call) -> Tensor | None:
    """The first argument that the op writes to."""
    return call.arguments.get("ring", call.arguments.get("out"))


def replace(call: Call, old: Tensor, new: Any) -> None:
    """Put another tensor in the place of one."""
    for name, value in call.arguments.items():
        if value is old:
            call.arguments[name] = new
        elif isinstance(value, list):
            call.arguments[name] = [new if each is old else each for each in value]


def change(draw: Draw, call: Call) -> None:
    """Change one argument."""
    name = draw(st.sampled_from(sorted(call.arguments)))
    value = call.arguments[name]
    if draw(st.integers(0, 9)) == 0:
        call.arguments[name] = draw(st.sampled_from(WRONG_TYPES))
        call.changes.append(f"{name} = {call.arguments[name]!r}")
        return
    if isinstance(value, list) and value and isinstance(value[0], Tensor) and draw(st.integers(0, 3)) == 0:
        call.arguments[name] = draw(st.sampled_from([[], value * 65, [*value, None], [*value, 1.0], tuple(value)]))
        call.changes.append(f"{name}: a list of {len(call.arguments[name])}")
        return
    tensors = tensors_of([value])
    if tensors:
        old = draw(st.sampled_from(tensors))
        changed = draw(st.sampled_from(TENSOR_CHANGES))
        # Some changes do not go together: a sparse tensor has no view, and becomes no array.
        with suppress(RuntimeError, TypeError):
            replace(call, old, changed(draw, old, call))
        call.changes.append(f"{name}: {changed.__name__}")
    elif isinstance(value, list):
        slots = list(value)
        kind = draw(st.sampled_from(["other", "one more", "none", "twice"]))
        if kind == "other" and slots:
            slots[draw(st.integers(0, len(slots) - 1))] = draw(st.sampled_from([*HUGE, 0, 1.5, None, True, "0"]))
        elif kind == "one more":
            slots.append(draw(st.integers(-2, 5)))
        else:
            slots = [] if kind == "none" else slots * 2
        call.arguments[name] = slots
        call.changes.append(f"{name} = {slots}")
    else:
        call.arguments[name] = draw(st.sampled_from([*HUGE, *SPECIAL, 0, True, "0"]))
        call.changes.append(f"{name} = {call.arguments[name]!r}")


@st.composite
def calls(draw: Draw, op: str) -> Call:
    """A call with none to three changes."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    call = Call(op, valid(draw, op))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 3]))):
        change(draw, call)
    return call

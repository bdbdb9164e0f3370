"""Whatever the ops are called with: the reference's answer, or an error that names what is wrong; nothing else changes.

`make fuzz` draws many thousands of calls. The latest one is in the file that LESA_FUZZ_LOG names, for a crash.
"""

from __future__ import annotations

import math
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fuzzed_calls import SPECIAL_CALLS, Call, calls, tensors_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lesa_kernels.ops import OPS, reference

WRITTEN = {"forecast_into": ["ring"], "push": ["ring"], "predict_l1": ["out"]}
# Sums of up to 65 products in other orders, of numbers around 1.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
# torch itself refuses some layouts, and to write to what inference mode made.
FROM_TORCH = ("Could not run", "int too big to convert", "Inference tensors", "Inplace update to inference tensor")
COUNTS: Counter[tuple[str, str]] = Counter()


@pytest.fixture(scope="module", autouse=True)
def _told(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None:
        for op in OPS:
            outcomes = ", ".join(f"{count} {what}" for (of, what), count in sorted(COUNTS.items()) if of == op)
            reporter.write_line(f"\n{op}: {outcomes}" if outcomes else "", flush=True)


def _bits(tensor: Tensor) -> Tensor | None:
    """A copy of what a tensor holds, None where it holds nothing that could be compared."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        return None
    with torch.no_grad():
        plain = tensor.detach().as_subclass(Tensor).resolve_neg().reshape(-1)
        # NaN equals NaN as bytes.
        return torch.empty(plain.shape, dtype=plain.dtype).copy_(plain).view(torch.uint8)


def _storages(values: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors_of(values) if t.layout == torch.strided and not t.is_meta}


def _copies(arguments: dict[str, Any]) -> list[Any]:
    """The arguments as torch reads them, none of which shares memory with another."""
    plain = lambda tensor: tensor.detach().as_subclass(Tensor).resolve_neg().clone()  # noqa: E731
    return tree_map_only(bool, int, list(tree_map_only(Tensor, plain, arguments).values()))


def _is_extreme(tensor: Tensor) -> bool:
    """Whether a tensor holds a finite number that has no square in float32."""
    if tensor.is_meta or not tensor.is_floating_point() or tensor.dtype == torch.float8_e4m3fn:
        return False
    return bool(((tensor.detach().abs() > 1e15) & tensor.detach().isfinite()).any())


def _close(got: Tensor, want: Tensor, sums: torch.dtype) -> bool:
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if got.is_meta:
        return True
    got, want, tolerance = got.double(), want.double(), max(TOLERANCES[got.dtype], TOLERANCES[sums])
    both = got.isfinite() & want.isfinite()
    size = want[both].abs().max().item() if bool(both.any()) else 0.0
    if not bool((got.isfinite() | ~want.isfinite()).all()):
        return False
    return not both.any() or (got - want)[both].abs().max().item() <= tolerance * max(1.0, size) * 30


def _values(call: Call, arguments: list[Any], results: Any) -> list[Tensor]:
    """What the op returned and wrote."""
    named = dict(zip(call.arguments, arguments, strict=True))
    values = tensors_of([*results] if isinstance(results, tuple) else [results])
    return values + tensors_of([named[name] for name in WRITTEN.get(call.op, [])])


def check(call: Call) -> None:
    """Make the call, and the reference's, and compare."""
    if log := os.environ.get("LESA_FUZZ_LOG"):
        with open(log, "w") as file:
            # Not the arguments: torch crashes when it prints some of them.
            file.write(f"{call.op}: {call.changes}\n")
    told = f"{call.op}, {call.changes}"
    arguments = list(call.arguments.values())
    tensors = tensors_of(arguments)
    before = [_bits(tensor) for tensor in tensors]
    try:
        copies = _copies(call.arguments)
    # What cannot be copied cannot be computed with either.
    except RuntimeError:
        copies = None
    results, refusal = None, None
    try:
        results = getattr(torch.ops.lesa, call.op)(*arguments)
    # The last one is torch's own, for integers beyond any float.
    except (RuntimeError, OverflowError) as error:
        refusal = str(error)
    if refusal is not None:
        assert call.changes, f"{call.op} refuses what is valid: {refusal}"
        assert any(name in refusal for name in (*call.arguments, *FROM_TORCH)), (
            f"{told}: no argument is named: {refusal}"
        )
        for tensor, bits in zip(tensors, before, strict=True):
            assert bits is None or torch.equal(bits, _bits(tensor)), f"{told}: an argument changed"
        COUNTS[call.op, "refused"] += 1
        return
    assert copies is not None, f"{told}: computed with what cannot be copied"
    with torch.no_grad():
        try:
            wanted = OPS[call.op].checked(getattr(reference, call.op))(*copies)
        except RuntimeError as error:
            raise AssertionError(f"{told}: took what the reference refuses: {error}") from error
    plain = tree_map_only(Tensor, lambda tensor: tensor.detach().as_subclass(Tensor), results)
    held = tree_map_only(Tensor, lambda tensor: tensor.detach().as_subclass(Tensor), arguments)
    sums = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    # Squares of such numbers overflow, at another place of another order.
    if any(_is_extreme(tensor) for tensor in tensors):
        COUNTS[call.op, "computed, too large to compare"] += 1
        return
    for got, want in zip(_values(call, held, plain), _values(call, copies, wanted), strict=True):
        assert _close(got, want, sums), f"{told}: {got} is not {want}"
    may_change = _storages([call.arguments[name] for name in WRITTEN.get(call.op, [])])
    for tensor, bits in zip(tensors, before, strict=True):
        if bits is not None and not _storages([tensor]) & may_change:
            assert torch.equal(bits, _bits(tensor)), f"{told}: an input changed"
    COUNTS[call.op, "computed"] += 1


@pytest.mark.parametrize("op", OPS)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, on layouts that it is still working on
def test_an_op_gives_the_right_answer_or_names_what_is_wrong(op: str, data: st.DataObject) -> None:
    call = data.draw(calls(op))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(call)
    for kept in call.kept:
        if isinstance(kept, tuple):
            original, before = map(_bits, kept)
            assert before is None or torch.equal(original, before), f"{op}, {call.changes}: wrote to a copy's original"


def test_what_is_drawn_is_of_an_op() -> None:
    assert set(SPECIAL_CALLS) < set(OPS)


def test_a_wrong_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    history = [torch.ones(2, 3)]
    call = Call("predict", {"history": history, "weight": torch.ones(1), "bias": torch.ones(1), "gain": torch.ones(1)})
    check(call)
    right = reference.predict
    monkeypatch.setattr(reference, "predict", lambda *arguments: right(*arguments) + math.pi)
    with pytest.raises(AssertionError, match="is not"):
        check(call)

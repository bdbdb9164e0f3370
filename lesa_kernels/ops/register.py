"""Defines `torch.ops.lesa.*` from the declarations in the files of the families.

Compiled kernels take the CPU and CUDA keys of the dispatcher when `lesa_kernels.backends` loads them; every other
device runs the references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from lesa_kernels.ops import contract


class _Library(torch.library.Library):
    """The ops' library. What it puts under the key of autograd steps aside under `torch.func` and forward-mode AD."""

    def impl(self, op_name: str, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key == "Autograd":
            fn = _differentiated_by_torch(OPS[op_name], fn)
        super().impl(op_name, fn, dispatch_key, **options)  # type: ignore[no-untyped-call]


_library: torch.library.Library = _Library("lesa", "DEF")  # type: ignore[no-untyped-call]


MakeTensor: TypeAlias = Callable[..., Tensor]
"""Makes a tensor of a shape, which it takes as numbers."""


@dataclass(frozen=True)
class Op:
    """What one op is. `reference`, `check` and `fake` take the op's arguments in order, `check` after the op's name.

    Args:
        schema: str, its name, arguments and results in torch's notation.
        reference: computes the results in plain torch; what it gets has passed the check.
        check: takes the op's name first; raises TypeError or ValueError for a wrong argument.
        example: makes valid arguments for tests, of a function that makes a tensor of a shape and the shape of a
            feature.
        fake: returns tensors like the results without computing them; None where the op returns nothing.
        backward: what autograd calls, see `torch.library.register_autograd`; None refuses gradients.
        setup_context: saves what `backward` needs.
    """

    schema: str
    reference: Callable[..., Any]
    check: Callable[..., None]
    example: Callable[[MakeTensor, tuple[int, ...]], tuple[Any, ...]]
    fake: Callable[..., Any] | None = None
    backward: Callable[..., Any] | None = None
    setup_context: Callable[..., None] | None = None

    @property
    def name(self) -> str:
        """The name, as in `torch.ops.lesa`."""
        return self.schema.partition("(")[0]

    @property
    def family(self) -> str:
        """The stem of the files that hold it, on every floor."""
        return self.reference.__module__.rpartition(".")[2]

    @property
    def is_differentiable(self) -> bool:
        """Whether autograd has gradients for it."""
        return self.backward not in (None, refuse_second_derivative)

    @cached_property
    def arguments(self) -> list[Any]:
        """The arguments of the schema, as torch parses it."""
        return list(torch._C.parse_schema(f"lesa::{self.schema}").arguments)

    @cached_property
    def written(self) -> list[tuple[int, str]]:
        """The positions and names of the arguments that it writes to."""
        infos = ((k, argument.name, argument.alias_info) for k, argument in enumerate(self.arguments))
        return [(k, name) for k, name, info in infos if info and info.is_write]

    def checked(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that checks the op's arguments, once, and then calls another with them."""
        name, check = self.name, self.check
        tensors = [(k, argument.name) for k, argument in enumerate(self.arguments) if "Tensor" in str(argument.type)]
        optional = {k for k, argument in enumerate(self.arguments) if isinstance(argument.type, torch.OptionalType)}

        @wraps(function)
        def call(*arguments: Any) -> Any:
            try:
                for k, argument in tensors:
                    if k not in optional or arguments[k] is not None:
                        contract.check_dense(name, argument, arguments[k])
                check(name, *arguments)
            except (TypeError, ValueError) as error:
                raise RuntimeError(str(error)) from None
            return function(*arguments)

        return call


OPS: dict[str, Op] = {}


def declare(op: Op) -> None:
    """Define an op: its reference for all devices, its fake, its gradients."""
    OPS[op.name] = op
    _library.define(op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(op.name, op.checked(op.reference), "CompositeExplicitAutograd")
    for key in ("FuncTorchBatched", "Batched"):  # vmap, and its older form behind `is_grads_batched`
        _library.impl(op.name, _batched(op), key)
    torch.library.register_fake(f"lesa::{op.name}", op.checked(op.fake or _returns_nothing), lib=_library)
    if op.backward is None:
        _implement_without_gradients(op)
    else:
        torch.library.register_autograd(f"lesa::{op.name}", op.backward, setup_context=op.setup_context, lib=_library)


def is_transformed(*arguments: Any) -> bool:
    """Return whether torch differentiates forwards or transforms a function: `make_dual`, `torch.func`."""
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    tensors = [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)


def _differentiated_by_torch(op: Op, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return an autograd kernel that leaves transformed calls to the reference, whose parts torch can transform."""
    reference, transforms = op.checked(op.reference), torch._C._are_functorch_transforms_active

    def call(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        # Every call passes here, so the common answer comes without another function.
        if not (transforms() or forward_ad._current_level >= 0) or not is_transformed(arguments):
            return kernel(keyset, *arguments)
        if op.backward is None and torch.is_grad_enabled():
            _refuse_gradients(op, arguments)
        return reference(*arguments)

    return call


def _batched(op: Op) -> Callable[..., Any]:
    """Return what serves an op under vmap: the reference, whose parts torch can batch."""
    reference = op.checked(op.reference)

    def call(*arguments: Any) -> Any:
        for position, name in op.written:
            tensor = arguments[position]
            if tensor is not None and not torch._C._functorch.is_batchedtensor(tensor):
                raise RuntimeError(
                    f"lesa::{op.name}: {name} must be batched by vmap like what it is written from, got one tensor for "
                    "all; give it a dimension for vmap, or call the op in a loop"
                )
        return reference(*arguments)

    return call


def _returns_nothing(*arguments: Any) -> None:
    """Serve as the fake of an op that only writes to its arguments."""


def fresh_like(tensor: Tensor) -> Tensor:
    """Return a fresh contiguous tensor of another's shape, dtype and device."""
    return tensor.new_empty(tensor.shape)


def save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Save all arguments for the backward, those in lists one by one."""
    flat: list[Tensor] = []
    for value in inputs:
        flat += value if isinstance(value, (list, tuple)) else [value]
    ctx.save_for_backward(*flat)


def refuse_second_derivative(ctx: Any, *grads: Any) -> None:
    """Serve as the backward of an op that computes gradients."""
    raise RuntimeError("lesa: predict and kan_linear are differentiable once, got a gradient of their gradients")


def _refuse_gradients(op: Op, arguments: Sequence[Any]) -> None:
    """Refuse gradients that an op would lose."""
    for argument, value in zip(op.arguments, arguments, strict=False):
        tensors = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(each, Tensor) and each.requires_grad for each in tensors):
            raise RuntimeError(
                f"lesa::{op.name}: {argument.name} must not require gradients, the op has none; detach it, or call "
                "the op under torch.no_grad()"
            )


def _implement_without_gradients(op: Op) -> None:
    """Let autograd see what the op writes to: a backward that saved the old values of it then fails."""
    overload, places = getattr(torch.ops.lesa, op.name).default, op.written

    def kernel(keyset: torch._C.DispatchKeySet, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            _refuse_gradients(op, arguments)
        written = [arguments[position] for position, _ in places if arguments[position] is not None]
        for tensor in written:
            if tensor.is_neg():
                raise RuntimeError(
                    f"lesa::{op.name}: {places[0][1]} must hold what is written as it is, got a view with the "
                    "negative bit; resolve_neg() makes a tensor without"
                )
        try:
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)
        except RuntimeError:
            written = []  # a call that was refused has changed nothing
            raise
        finally:  # after Ctrl-C as well
            for tensor in written:
                torch.autograd.graph.increment_version(tensor)

    # Inference mode leaves the first key out, and the second one in for tensors from outside of it.
    for key in ("Autograd", "ADInplaceOrView") if places else ("Autograd",):
        _library.impl(op.name, kernel, key, with_keyset=True)

"""Every op under forward-mode AD, `torch.func` and vmap: as finite differences and loops say, or refused in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_inputs import make_parameters, random, valid_arguments
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from lesa_kernels import LesaPredictor
from lesa_kernels.ops import OPS, predict_l1_loss

pytestmark = pytest.mark.usefixtures("poisoned_memory")
ops = torch.ops.lesa
Function = Callable[..., Any]
WITH_GRADIENTS = [name for name, op in OPS.items() if op.backward is not None]
WITHOUT_GRADIENTS = [name for name in OPS if name not in WITH_GRADIENTS]
WRITING = [name for name, op in OPS.items() if op.written]


def _call_of(
    op: str, dtype: torch.dtype = torch.float64, serves: Function | None = None
) -> tuple[Function, tuple[Tensor, ...]]:
    """An op as a function of tensors alone, and valid ones; of what it writes, it gets a copy and returns it."""
    arguments = valid_arguments(dtype, grad=False, feature=(2, 3))[op]
    function = serves or getattr(ops, op)
    leaves, structure = tree_flatten(arguments)
    positions = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        filled = list(leaves)
        for position, tensor in zip(positions, tensors, strict=True):
            filled[position] = tensor
        changed = list(tree_unflatten(filled, structure))
        written = [position for position, _ in OPS[op].written]
        for position in written:
            changed[position] = changed[position].clone()
        results = function(*changed)
        return (*[leaf for leaf in tree_leaves(results) if leaf is not None], *[changed[k] for k in written])

    return call, tuple(leaves[position] for position in positions)


def _size(results: Any) -> Tensor:
    """One number made of all results."""
    return sum(((result + 1) ** 2).sum() for result in tree_leaves(results))  # type: ignore[return-value]


def _differences(function: Function, at: Sequence[Tensor], along: Sequence[Tensor], step: float = 1e-6) -> list[Tensor]:
    """Derivative of a function along a direction."""
    ahead, behind = (function(*[x + sign * step * t for x, t in zip(at, along, strict=True)]) for sign in (1, -1))
    return [(a - b) / (2 * step) for a, b in zip(tree_leaves(ahead), tree_leaves(behind), strict=True)]


def _along(jacobian: Any, along: Sequence[Tensor]) -> Tensor:
    """A Jacobian, one for each argument, applied to a direction."""
    return sum((part * t).sum(tuple(range(-t.dim(), 0))) if t.dim() else part * t  # type: ignore[return-value]
               for part, t in zip(jacobian, along, strict=True))  # fmt: skip


def _assert_close(got: Any, want: Any) -> None:
    for one, other in zip(tree_leaves(got), tree_leaves(want), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.float64
def test_tangents_are_those_of_finite_differences(op: str) -> None:
    call, at = _call_of(op)
    along = tuple(map(torch.randn_like, at))
    want = _differences(call, at, along)
    _assert_close(jvp(call, at, along)[1], want)
    with forward_ad.dual_level():
        duals = call(*map(forward_ad.make_dual, at, along))
        _assert_close([forward_ad.unpack_dual(dual).tangent for dual in duals], want)
        primals = [forward_ad.unpack_dual(dual).primal for dual in duals]
    _assert_close(primals, call(*at))


def test_tangents_on_the_device_are_those_of_the_reference(op: str) -> None:
    call, at = _call_of(op, torch.float32)
    reference, _ = _call_of(op, torch.float32, OPS[op].reference)
    along = tuple(map(torch.randn_like, at))
    _assert_close(jvp(call, at, along), jvp(reference, at, along))


@pytest.mark.float64
def test_one_dual_argument_is_enough(op: str) -> None:
    call, at = _call_of(op)
    for k, argument in enumerate(at):
        along = [torch.randn_like(each) if each is argument else torch.zeros_like(each) for each in at]
        with forward_ad.dual_level():
            duals = call(*at[:k], forward_ad.make_dual(argument, along[k]), *at[k + 1 :])
            tangents = [forward_ad.unpack_dual(dual).tangent for dual in duals]
        for tangent, want in zip(tangents, _differences(call, at, along), strict=True):
            _assert_close(torch.zeros_like(want) if tangent is None else tangent, want)


@pytest.mark.float64
def test_forward_jacobians(op: str) -> None:
    call, at = _call_of(op)
    along = tuple(map(torch.randn_like, at))
    jacobians = jacfwd(call, argnums=tuple(range(len(at))))(*at)
    _assert_close([_along(jacobian, along) for jacobian in jacobians], _differences(call, at, along))


@pytest.mark.float64
@pytest.mark.parametrize("op", WITH_GRADIENTS)
def test_reverse_transforms_of_ops_with_gradients(op: str) -> None:
    call, at = _call_of(op)
    along, every = tuple(map(torch.randn_like, at)), tuple(range(len(at)))
    _assert_close([_along(each, along) for each in jacrev(call, argnums=every)(*at)], _differences(call, at, along))

    def size(*tensors: Tensor) -> Tensor:
        return _size(call(*tensors))

    of_size = grad(size, argnums=every)
    _assert_close(_along(of_size(*at), along), _differences(size, at, along))
    twice = [_along(row, along) for row in hessian(size, argnums=every)(*at)]
    _assert_close(twice, _differences(of_size, at, along))
    other = [x - 1 for x in at]
    loop = [torch.stack(pair) for pair in zip(of_size(*at), of_size(*other), strict=True)]
    _assert_close(vmap(of_size)(*map(torch.stack, zip(at, other, strict=True))), loop)


@pytest.mark.float64
@pytest.mark.parametrize("op", [name for name, op in OPS.items() if op.is_differentiable])
def test_gradcheck_forwards_and_in_batches(op: str) -> None:
    arguments, structure = tree_flatten(valid_arguments(torch.float64, grad=True, feature=(2, 3))[op])

    def call(*leaves: Any) -> Any:
        results = getattr(ops, op)(*tree_unflatten(leaves, structure))
        return tuple(results) if isinstance(results, list) else results

    options = {"check_forward_ad": True, "check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(call, arguments, **options)


@pytest.mark.float64
@pytest.mark.parametrize("transform", [grad, jacrev, hessian], ids=lambda each: each.__name__)
@pytest.mark.parametrize("op", WITHOUT_GRADIENTS)
def test_reverse_transforms_of_ops_without_gradients_are_refused(op: str, transform: Function) -> None:
    call, at = _call_of(op)
    with pytest.raises(RuntimeError, match=rf"lesa::{op}: \w+ must not require gradients, the op has none"):
        transform(lambda *tensors: _size(call(*tensors)))(*at)


def _written(op: str) -> list[int]:
    """Which of the tensors that `_call_of` returns the op writes to."""
    arguments = valid_arguments(torch.float64, grad=False)[op]
    before = [tree_leaves(arguments[:position]) for position, _ in OPS[op].written]
    return [sum(isinstance(leaf, Tensor) for leaf in leaves) for leaves in before]


def _loop(call: Function, inputs: Sequence[Tensor], dims: Sequence[int | None]) -> list[Tensor]:
    """What vmap over first dimensions means."""
    count = next(len(x) for x, dim in zip(inputs, dims, strict=True) if dim == 0)
    each = [call(*[x if dim is None else x[n] for x, dim in zip(inputs, dims, strict=True)]) for n in range(count)]
    return [torch.stack(results) for results in zip(*each, strict=True)]


@pytest.mark.float64
def test_vmap_is_a_loop(op: str) -> None:
    call, at = _call_of(op)
    written = _written(op)
    batches = [torch.stack([x, 2 * x, x - 1]) for x in at]
    for batched in [range(len(at)), *[[n, *written] for n in range(len(at))]]:
        dims = tuple(0 if n in batched else None for n in range(len(at)))
        inputs = [batches[n] if n in batched else x for n, x in enumerate(at)]
        _assert_close(vmap(call, in_dims=dims)(*inputs), _loop(call, inputs, dims))


@pytest.mark.float64
@pytest.mark.parametrize("op", WRITING)
def test_vmap_does_not_write_one_tensor_for_all(op: str) -> None:
    call, at = _call_of(op)
    written = _written(op)
    dims = tuple(None if n in written else 0 for n in range(len(at)))
    with pytest.raises(RuntimeError, match=rf"lesa::{op}: \w+ must be batched by vmap"):
        vmap(call, in_dims=dims)(*[x if dim is None else x[None] for x, dim in zip(at, dims, strict=True)])


def test_what_is_written_takes_on_and_loses_tangents() -> None:
    ring, one = torch.randn(3, 4), torch.ones(1, 1)
    with forward_ad.dual_level():
        feature = forward_ad.make_dual(torch.randn(4), torch.full((4,), 2.0))
        ops.push(ring, feature, 1)
        ops.forecast_into(ring, forward_ad.make_dual(one, 3 * one), torch.zeros(1), [0], [2])
        tangent = forward_ad.unpack_dual(ring).tangent
        assert torch.equal(tangent, torch.stack([torch.zeros(4), torch.full((4,), 2.0), 3 * ring[0]]))
        ops.forecast_into(ring, one, torch.zeros(1), [0], [2])
        ops.push(ring, torch.zeros(4), 1)
        assert not forward_ad.unpack_dual(ring).tangent.any()


@pytest.mark.float64
def test_a_predictor_is_differentiated_forwards() -> None:
    predictor = LesaPredictor(num_steps=4, stages=[(-1.0, 2)], hidden_dim=3).double()
    sigmas, history = [1.0, 0.75, 0.5, 0.25, 0.0], [torch.randn(2, 3, dtype=torch.float64) for _ in range(2)]
    names, at = zip(
        *{name: parameter.detach() for name, parameter in predictor.named_parameters()}.items(), strict=True
    )

    def call(*tensors: Tensor) -> Tensor:
        arguments = (list(tensors[:2]), sigmas, 0.6)
        return functional_call(predictor, dict(zip(names, tensors[2:], strict=True)), arguments)  # type: ignore[no-any-return]

    at = (*history, *[parameter.detach() for parameter in predictor.parameters()])
    along = tuple(map(torch.randn_like, at))
    _assert_close(jvp(call, at, along)[1], _differences(call, at, along))
    with forward_ad.dual_level():
        dual = predictor([forward_ad.make_dual(each, each) for each in history], sigmas, 0.6)
        assert forward_ad.unpack_dual(dual).tangent.any()
    every = tuple(range(len(at)))
    _assert_close(_along(jacrev(call, argnums=every)(*at), along), _differences(call, at, along))
    loop = torch.stack([predictor([each, each], sigmas, 0.6) for each in history])
    _assert_close(vmap(lambda each: predictor([each, each], sigmas, 0.6))(torch.stack(history)), loop)


@pytest.mark.float64
def test_the_loss_of_one_pass_is_transformed_as_well() -> None:
    history, target = [random(2, 3, grad=False) for _ in range(3)], random(2, 3, grad=False)
    at = make_parameters(3, torch.float64)
    along = tuple(map(torch.randn_like, at))

    def loss(*parameters: Tensor) -> Tensor:
        return predict_l1_loss(history, target, *parameters)

    _assert_close(jvp(loss, at, along)[1], _differences(loss, at, along))
    leaves = [x.clone().requires_grad_() for x in at]
    _assert_close(grad(loss, argnums=(0, 1, 2))(*at), torch.autograd.grad(loss(*leaves), leaves))
    with pytest.raises(RuntimeError, match=r"history\[0\] must not require gradients"):
        grad(lambda first: predict_l1_loss([first, *history[1:]], target, *at))(history[0])

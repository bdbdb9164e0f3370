"""Inputs for the op tests: dtypes, odd shapes, strides and storage offsets, and the comparison with float64.

Tensors are made on torch's default device, which the caller sets (`with torch.device("cuda"):`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.ops import OPS, TOLERANCES, reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (63,), (2, 5, 13), (1030,), (4, 4097)]
COUNTS = [1, 2, 3, 4, 8, 17, 64]

Layout = Callable[[tuple[int, ...], torch.dtype], Tensor]


def contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Plain rows."""
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def offset(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Contiguous, but one element into its storage: never aligned to a vector."""
    tensor = torch.empty(torch.Size(shape).numel() + 1, dtype=dtype)[1:].view(shape)
    return tensor.copy_(contiguous(shape, dtype))


def transposed(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Dense with its dimensions in reverse order."""
    return contiguous(shape[::-1], dtype).permute(tuple(reversed(range(len(shape)))))


def padded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows with a gap between them."""
    if not shape:
        return contiguous(shape, dtype)
    return contiguous((*shape[:-1], shape[-1] + 3), dtype)[..., 1 : shape[-1] + 1]


def every_second(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """No two elements next to each other."""
    if not shape:
        return contiguous(shape, dtype)
    return contiguous((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]


def expanded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """One value everywhere: strides of zero."""
    return contiguous((), dtype).expand(shape)


LAYOUTS: list[Layout] = [contiguous, offset, transposed, padded, every_second, expanded]


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values in float64."""
    return [tensor.double() for tensor in tensors]


def assert_close(got: Tensor, want: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
    """Check values against float64 within the tolerance of a dtype.

    Args:
        got: what a kernel returned.
        want: float64, what the reference says.
        scale: float64, the sum of the magnitudes of the terms of each element.
        dtype: whose tolerance holds.
    """
    assert got.shape == want.shape
    tolerance = TOLERANCES[dtype]
    excess = (got.double() - want).abs() - (tolerance.absolute + tolerance.relative * scale)
    assert not torch.isnan(got).any(), "a result was not written or is NaN"
    assert bool((excess <= 0).all()), f"off by {excess.max().item():.3e} beyond the tolerance of {dtype}"


def predict_scale(history: Sequence[Tensor], weight: Tensor, bias: Tensor, gain: Tensor) -> Tensor:
    """Sum of the magnitudes of predict's terms, float64."""
    positive = [tensor.abs() for tensor in wide([*history, weight, bias, gain])]
    return reference.predict(positive[: len(history)], *positive[len(history) :])


def extreme_features(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Features whose products leave float32's range, up or down, everywhere or in parts, beside plain ones."""
    scales = torch.tensor([1e25, 1e-25, 1.0, 1e-33, 3e37]).double()
    features = [torch.randn(shape, dtype=torch.float64) * scale for scale in scales]
    mixed = [torch.randn(shape, dtype=torch.float64) * scales[torch.randint(5, shape)] for _ in range(2)]
    runs = torch.randn(shape, dtype=torch.float64) * scales[torch.arange(shape[0]) // 1500 % 3]
    return [feature.to(dtype) for feature in (*features, *mixed, runs)]


def assert_close_gram(got: Tensor, features: list[Tensor]) -> None:
    """Without an absolute tolerance, relative to the two features: what is lost beside larger terms is no error."""
    want = reference.gram(wide(features))
    assert want.isfinite().all() and torch.equal(got, got.T)
    size = want.diagonal().sqrt()
    assert bool(((got - want).abs() <= TOLERANCES[torch.float32].relative * size[:, None] * size).all())


def finest() -> torch.dtype:
    """The widest dtype of features on the test's device."""
    return torch.float64 if torch.get_default_device().type == "cpu" else torch.float32


def random(*shape: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
    return torch.randn(shape, dtype=dtype or finest(), requires_grad=grad)


def make_parameters(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and gain of `predict`."""
    return contiguous((count,), dtype), contiguous((1,), dtype), contiguous((), dtype)


def kan_layer(dtype: torch.dtype | None = None, grad: bool = True) -> tuple[Tensor, ...]:
    dtype = dtype or finest()
    grid = (torch.arange(-3, 9) * 1.2 - 3).to(dtype).expand(3, 12).contiguous()
    # Kept off the knots: bases of low order have kinks there.
    x = (torch.rand(4, 3, dtype=dtype) * 8 - 4).requires_grad_(grad)
    return (x, grid, *(random(*shape, dtype=dtype, grad=grad) for shape in [(2, 3), (2, 3, 8), (2, 3)]))


def valid_arguments(dtype: torch.dtype, grad: bool, feature: tuple[int, ...] = (3, 5)) -> dict[str, tuple[Any, ...]]:
    """One set of valid arguments for each op, of float dtypes alike; with gradients where the op has them."""

    def maker(wanted: bool) -> Callable[..., Tensor]:
        return lambda *shape: random(*shape, dtype=dtype, grad=wanted)

    return {name: op.example(maker(grad and op.is_differentiable), feature) for name, op in OPS.items()}

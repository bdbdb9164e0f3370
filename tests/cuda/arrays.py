"""Tensors for kernels that run without a GPU: NumPy arrays of poison, of any strides and offset."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

DTYPES = ("float32", "float16", "bfloat16")


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round to a dtype; of bfloat16, which NumPy lacks, arrays hold the bits."""
    rounded = torch.from_numpy(np.array(values)).to(getattr(torch, dtype))
    bits: np.ndarray = (rounded.view(torch.uint16) if dtype == "bfloat16" else rounded).numpy()
    return bits


def decode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Widen to float64."""
    tensor = torch.from_numpy(np.array(values))
    wide: np.ndarray = (tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor).double().numpy()
    return wide


@dataclass
class Array:
    """A view of a larger storage; strides and offset in elements."""

    storage: np.ndarray
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def view(self) -> np.ndarray:
        size = self.storage.itemsize
        return np.lib.stride_tricks.as_strided(
            self.storage[self.offset :], self.shape, tuple(size * stride for stride in self.strides)
        )

    @property
    def values(self) -> np.ndarray:
        return decode(self.view, self.dtype)

    def untouched(self) -> int:
        """How many elements of the storage are still poison."""
        return int(np.isnan(decode(self.storage, self.dtype)).sum())


Layout = Callable[[tuple[int, ...], str], Array]


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[d + 1 :])) for d in range(len(shape)))


def place(shape: tuple[int, ...], strides: tuple[int, ...], offset: int, dtype: str) -> Array:
    """An array of poison: NaN everywhere, between its elements too."""
    length = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + 1
    return Array(encode(np.full(length, np.nan), dtype), offset, shape, strides, dtype)


def contiguous(shape: tuple[int, ...], dtype: str) -> Array:
    return place(shape, row_major(shape), 0, dtype)


def line(size: int, offset: int, dtype: str) -> Array:
    """A contiguous array of one dimension that begins `offset` elements behind an aligned address."""
    return place((size,), (1,), offset, dtype)


def misaligned(shape: tuple[int, ...], dtype: str) -> Array:
    return place(shape, row_major(shape), 1, dtype)


def padded(shape: tuple[int, ...], dtype: str) -> Array:
    """Rows with a gap of 8 elements between them, aligned to vectors."""
    return place(shape, row_major((*shape[:-1], shape[-1] + 8)), 8, dtype)


def transposed(shape: tuple[int, ...], dtype: str) -> Array:
    return place(shape, row_major(shape[::-1])[::-1], 0, dtype)


def sparse(shape: tuple[int, ...], dtype: str) -> Array:
    """Gaps between all elements and more between rows: no two dimensions merge."""
    strides = [2]
    for size in shape[:0:-1]:
        strides.insert(0, strides[0] * size + 1)
    return place(shape, tuple(strides), 1, dtype)


def filled(array: Array, rng: np.random.Generator) -> Array:
    array.view[...] = encode(rng.standard_normal(array.shape), array.dtype)
    return array


def random(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Array:
    return filled(contiguous(shape, dtype), rng)


def tensor_of(array: Array) -> torch.Tensor:
    """The values in float64, for the reference."""
    return torch.from_numpy(np.array(array.values))


def close(got: Array, want: Any, scale: Any, tolerance: Any) -> bool:
    """Whether values are written and within a tolerance of float64 ones; scale: the magnitudes of their terms."""
    error = np.abs(got.values - np.asarray(want))
    return bool((error <= tolerance.absolute + tolerance.relative * np.asarray(scale)).all())

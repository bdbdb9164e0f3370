"""Holds the features of a run in preallocated memory; nothing is stacked or allocated during the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Ring:
    """Slots for features of one shape, dtype and device.

    Args:
        num_slots: how many features it holds.
        shape: of one feature.
        dtype: of the slots; a feature of another dtype is converted when it is pushed.
        device: of the features, where the slots lie too.
    """

    def __init__(self, num_slots: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        # Made under inference_mode, the ring could not be written to by a later run outside of it.
        with torch.inference_mode(False):
            self._slots = torch.empty((num_slots, *shape), dtype=dtype, device=device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a feature."""
        return tuple(self._slots.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the slots."""
        return self._slots.dtype

    @property
    def device(self) -> torch.device:
        """Of the features, where the slots lie too."""
        return self._slots.device

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self._slots.nbytes

    def push(self, feature: Tensor, slot: int) -> None:
        """Copy a feature [*shape] into a slot; its gradient history stays behind."""
        torch.ops.lesa.push(self._slots, feature.detach(), slot)

    def forecast(self, coefficients: Tensor, offsets: Tensor, read: Sequence[int], write: Sequence[int]) -> None:
        """Fill the slots `write` with forecasts of the slots `read`; see `torch.ops.lesa.forecast_into`."""
        torch.ops.lesa.forecast_into(self._slots, coefficients, offsets, read, write)

    def error(self, coefficients: Tensor, offset: Tensor, read: Sequence[int], slot: int) -> Tensor:
        """Return how far a forecast of the slots `read` lies from the feature in another slot.

        Args:
            coefficients: [K], in the dtype of sums.
            offset: [1].
            read: K slots.
            slot: of the feature.

        Returns:
            mean |forecast - feature| / mean |feature|, [].
        """
        history, feature = [self._slots[each] for each in read], self._slots[slot]
        rest, one = coefficients.clone(), torch.ones_like(offset)
        rest[-1] -= 1  # predict_l1 adds the last feature once
        error: Tensor = torch.ops.lesa.predict_l1(history, feature, rest, offset, one, None)[0]
        size: Tensor = torch.linalg.vector_norm(feature, 1, dtype=error.dtype)
        return error * feature.numel() / size

    def __getitem__(self, slot: int) -> Tensor:
        """Return a slot [*shape]: a view."""
        return self._slots[slot]

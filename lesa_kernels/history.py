"""The ring: one preallocated tensor that holds the features of a run; nothing is stacked or allocated after it."""

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
        device: where it lies.
    """

    def __init__(self, num_slots: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.shape = tuple(shape)
        # Made under inference_mode, the ring could not be written to by a later run outside of it.
        with torch.inference_mode(False):
            self._slots = torch.empty((num_slots, *self.shape), dtype=dtype, device=device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the slots."""
        return self._slots.dtype

    @property
    def device(self) -> torch.device:
        """Where the ring lies."""
        return self._slots.device

    @property
    def num_slots(self) -> int:
        """How many features it holds."""
        return self._slots.shape[0]

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

    def __getitem__(self, slot: int) -> Tensor:
        """Return a view of a slot."""
        return self._slots[slot]

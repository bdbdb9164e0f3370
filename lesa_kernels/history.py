"""The ring: preallocated memory that holds the features of a run; nothing is stacked or allocated after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lesa_kernels.stopwatch import Stopwatch


class Ring:
    """Slots for features of one shape, dtype and device.

    Args:
        num_slots: how many features it holds.
        shape: of one feature.
        dtype: of the slots; a feature of another dtype is converted when it is pushed.
        device: of the features, where the slots lie too.
    """

    def __init__(self, num_slots: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        self._slots = _empty((num_slots, *shape), dtype, device)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a feature."""
        return tuple(self._slots.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the slots."""
        return self._slots.dtype

    @property
    def memory(self) -> torch.device:
        """Where the slots lie."""
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

    def error(self, coefficients: Tensor, offset: Tensor, read: Sequence[int], slot: int) -> Tensor:
        """Return how far a forecast of the slots `read` lies from the feature in another slot.

        Args:
            coefficients: [K], in the dtype of sums.
            offset: [1].
            read: K slots.
            slot: of the feature.

        Returns:
            mean |forecast - feature| / mean |feature|, [], where the slots lie.
        """
        history, feature = [self._slots[each] for each in read], self._slots[slot]
        rest, one = coefficients.clone(), torch.ones_like(offset)
        rest[-1] -= 1  # predict_l1 adds the last feature once
        error: Tensor = torch.ops.lesa.predict_l1(history, feature, rest, offset, one, None)[0]
        size: Tensor = torch.linalg.vector_norm(feature, 1, dtype=error.dtype)
        return error * feature.numel() / size

    def __getitem__(self, slot: int) -> Tensor:
        """Return a slot [*shape] on the features' device: a view."""
        return self._slots[slot]


class HostRing(Ring):
    """A ring in the host's memory for features of another device; forecasts are computed on the host.

    Args:
        num_slots: how many features it holds.
        shape: of one feature.
        dtype: of the slots.
        device: of the features.
    """

    def __init__(self, num_slots: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.device = device
        # Copies between pinned memory and the GPU run beside the host, in the order of the GPU's stream.
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._slots = _empty((num_slots, *shape), dtype, torch.device("cpu"), pinned=self._copied is not None)
        self.copies = Stopwatch()
        self.forecasts = Stopwatch()
        self.copied_bytes = 0

    def push(self, feature: Tensor, slot: int) -> None:
        """Copy a feature [*shape] to the host."""
        with self.copies.running(self.device):
            # Converted before the copy: a smaller dtype has less to carry.
            self._slots[slot].copy_(feature.detach().to(self.dtype), non_blocking=self._copied is not None)
        self._note_copy()

    def forecast(self, coefficients: Tensor, offsets: Tensor, read: Sequence[int], write: Sequence[int]) -> None:
        """See `Ring.forecast`; waits until all copies from and to the slots are done."""
        if self._copied is not None:
            self._copied.synchronize()
        with self.forecasts.running(self.memory):
            super().forecast(coefficients, offsets, read, write)

    def error(self, coefficients: Tensor, offset: Tensor, read: Sequence[int], slot: int) -> Tensor:
        """See `Ring.error`; waits until all copies from and to the slots are done."""
        if self._copied is not None:
            self._copied.synchronize()
        return super().error(coefficients, offset, read, slot)

    def __getitem__(self, slot: int) -> Tensor:
        """Return a slot [*shape] on the features' device: a copy."""
        with self.copies.running(self.device):
            feature = self._slots[slot].to(self.device, non_blocking=self._copied is not None, copy=True)
        self._note_copy()
        return feature

    def _note_copy(self) -> None:
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.device))
        self.copied_bytes += self.nbytes // self.num_slots


def _empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device, *, pinned: bool = False) -> Tensor:
    # Made under inference_mode, the ring could not be written to by a later run outside of it.
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)

"""Training in several processes: runs are split over them, gradients averaged, and one process writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_Value = TypeVar("_Value")


class Ranks:
    """The processes of `torch.distributed`, or this one alone.

    Raises:
        RuntimeError: when torchrun started several processes that do not know each other yet.
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if together else 1
        self.own = dist.get_rank() if together else 0
        if not together and dist.is_available() and dist.is_torchelastic_launched():
            raise RuntimeError("torchrun started this process: call torch.distributed.init_process_group() first")

    @property
    def writes(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.own == 0

    def check(self, num_runs: int, batch_size: int) -> None:
        """Check that runs can be split evenly: only then is the mean of the gradients that of the whole batch.

        Raises:
            ValueError: when they cannot.
        """
        for name, value in (("config.batch_size", batch_size), ("the number of runs of source", num_runs)):
            if value % self.count:
                raise ValueError(f"{name} must be a multiple of the {self.count} processes, got {value}")

    def share_of(self, runs: Sequence[int]) -> Sequence[int]:
        """Return the runs that this process runs."""
        length = len(runs) // self.count
        return runs[self.own * length : (self.own + 1) * length]

    def from_first(self, make: Callable[[], _Value]) -> _Value:
        """Return what the first process makes; where it fails, all of them do."""
        if self.count == 1:
            return make()
        made: list[_Value | Exception | None] = [None]
        if self.own == 0:
            try:
                made = [make()]
            except Exception as error:
                made = [error]
        dist.broadcast_object_list(made)
        (value,) = made
        if isinstance(value, Exception):
            raise value
        return value  # type: ignore[return-value]

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one dtype and device by their mean over the processes: one message."""
        if self.count == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.count
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def first_of(self, found: str | None) -> str | None:
        """Return what the first process that found something found."""
        if self.count == 1:
            return found
        everywhere: list[str | None] = [None] * self.count
        dist.all_gather_object(everywhere, found)
        return next((text for text in everywhere if text is not None), None)

    def wait(self) -> None:
        """Wait until all processes have come here."""
        if self.count > 1:
            dist.barrier()

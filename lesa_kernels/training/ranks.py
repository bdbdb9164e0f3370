"""Shares work among processes: runs are split, gradients averaged, and one process writes to a folder."""

from __future__ import annotations

import errno
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor

_Value = TypeVar("_Value")


class Ranks:
    """The processes of `torch.distributed`, or this one alone.

    Raises:
        RuntimeError: when torchrun started several processes and torch.distributed is not initialized.
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
        """Return what the first process makes, in all of them; where it fails, all fail."""
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
        """Return the text of the first process that has one, None where no process has."""
        if self.count == 1:
            return found
        everywhere: list[str | None] = [None] * self.count
        dist.all_gather_object(everywhere, found)
        return next((text for text in everywhere if text is not None), None)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def lock_folder(folder: Path) -> Generator[None, None, None]:
    """Make a folder if it is missing, and keep other processes out of it until this one is done or dies.

    Raises:
        BlockingIOError: when another process, or another thread, writes there.
        OSError: when the folder cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The lock's file is opened for writing, which also checks that files can be written here.
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        text = "another process writes to this folder; wait for it, stop it, or take another folder"
        raise BlockingIOError(errno.EAGAIN, text, str(folder)) from error
    try:
        yield
    finally:
        lock.release()

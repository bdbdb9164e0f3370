"""Saves and loads the state of a training between two batches, in one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lesa_kernels.files import LARGEST_WEIGHTS, opened_tensors, parsed, replacing, shortened

FILE = "checkpoint.safetensors"
_LOSSES = "losses"
# A number of Python's takes four times the memory of one in a tensor.
_MOST_BATCHES = 10_000_000
_DIFFERENCES_SHOWN = 4


@dataclass(frozen=True)
class Checkpoint:
    """All that a training needs to go on as if nothing had happened.

    Args:
        settings: all that the result depends on, by name; values as in JSON.
        tensors: parameters and the optimizer's state, by name.
        losses: of the batches that are done.
        seconds: how long they took.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        tensors = {name: tensor.detach().contiguous() for name, tensor in self.tensors.items()}
        tensors[_LOSSES] = torch.tensor(self.losses, dtype=torch.float64)
        metadata = {"settings": json.dumps(self.settings), "seconds": repr(self.seconds)}
        with replacing(folder / FILE) as file:
            save_file(tensors, file, metadata)

    @classmethod
    def load(cls, folder: Path) -> Checkpoint | None:
        """Read the checkpoint of a folder, None where there is none.

        Raises:
            ValueError: when the file is not one of a training.
        """
        file = folder / FILE
        if not file.exists():
            return None
        try:
            with opened_tensors(file, LARGEST_WEIGHTS) as opened:
                metadata = opened.metadata()
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            losses = tensors.pop(_LOSSES)
            if losses.dim() != 1 or losses.dtype != torch.float64:
                raise ValueError(f"{_LOSSES} must be a row of float64, got {tuple(losses.shape)} of {losses.dtype}")
            if len(losses) > _MOST_BATCHES:
                raise ValueError(f"{_LOSSES} must be of at most {_MOST_BATCHES} batches, got {len(losses)}")
            settings = parsed(metadata["settings"], file)
            return cls(settings, tensors, losses.tolist(), float(metadata["seconds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} must be the checkpoint of a training: {shortened(error)}") from error

    def check(self, settings: Mapping[str, Any], state: Mapping[str, Tensor], batches: int, folder: Path) -> None:
        """Check that it belongs to a training with these settings, tensors and number of batches.

        Raises:
            ValueError: when it does not; says what differs.
        """
        found = list(_differences(self.settings, json.loads(json.dumps(settings))))
        if found:
            more = len(found) - _DIFFERENCES_SHOWN
            shown = "; ".join(found[:_DIFFERENCES_SHOWN]) + (f"; and {more} more" if more > 0 else "")
            raise ValueError(f"out = {folder} holds another training: {shown}; take another folder, or delete it")
        # Equal settings mean equal tensors, unless the file was damaged or made up.
        kinds = [{name: (tensor.shape, tensor.dtype) for name, tensor in of.items()} for of in (self.tensors, state)]
        if kinds[0] != kinds[1] or len(self.losses) > batches:
            raise ValueError(f"{folder / FILE} must be the checkpoint of a training: it is not as its settings say")


def _differences(was: Any, now: Any, name: str = "") -> list[str]:
    """Describe where two values of JSON differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        names = [*was, *(key for key in now if key not in was)]
        return [
            text
            for key in names
            for text in _differences(was.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    if isinstance(was, list) and isinstance(now, list):
        if len(was) != len(now):
            return [f"{name} were {len(was)} values, now {len(now)}"]
        pairs = enumerate(zip(was, now, strict=True))
        return [text for index, (a, b) in pairs for text in _differences(a, b, f"{name}[{index}]")]
    return [] if was == now else [f"{name} was {was}, now {now}"]

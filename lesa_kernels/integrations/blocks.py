"""The lists of a model's blocks, and the model without them: what serves every transformer that loops over lists."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager

from torch import nn


class NoBlocks(nn.ModuleList):
    """Stands in for a list of blocks: a loop over it does nothing, its length and its items are those of the list.

    Models ask for the length to place ControlNet residuals, and DiT for an embedding inside its first block.

    Args:
        blocks: the list.
    """

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self._modules = blocks._modules

    def __iter__(self) -> Iterator[nn.Module]:
        """Iterate over nothing."""
        return iter(())


class Blocks:
    """The lists of a model's blocks, which can be skipped.

    Args:
        model: a transformer.
        paths: of its lists of blocks.

    Raises:
        ValueError: when there is no nn.ModuleList at a path.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._places: list[tuple[nn.Module, str, NoBlocks]] = []
        for path in paths:
            blocks = model.get_submodule(path)
            if not isinstance(blocks, nn.ModuleList):
                raise ValueError(f"lesa: {path} must be an nn.ModuleList of blocks, got {type(blocks).__name__}")
            parent, _, name = path.rpartition(".")
            self._places.append((model.get_submodule(parent), name, NoBlocks(blocks)))

    @contextmanager
    def skipped(self) -> Generator[None, None, None]:
        """Let the model's loops over its blocks do nothing for the length of a with statement."""
        lists = [parent._modules[name] for parent, name, _ in self._places]
        try:
            for parent, name, nothing in self._places:
                parent._modules[name] = nothing
            yield
        finally:
            for (parent, name, _), blocks in zip(self._places, lists, strict=True):
                parent._modules[name] = blocks

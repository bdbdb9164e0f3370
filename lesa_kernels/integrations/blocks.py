"""The lists of a model's blocks, and the model without them: what serves every transformer that loops over lists."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import nn


def find_block_lists(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the lists of blocks that a transformer holds, as diffusers names them."""
    return tuple(
        name
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList) and name.endswith(("blocks", "layers"))
    )


class SkippedBlocks(nn.ModuleList):
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


@contextmanager
def without_blocks(model: nn.Module, paths: Sequence[str]) -> Generator[None, None, None]:
    """Let the loops over a model's blocks do nothing for the length of a with statement.

    Args:
        model: a transformer.
        paths: of its lists of blocks.
    """
    with ExitStack() as restored:
        for path in paths:
            parent_path, _, name = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            blocks = parent._modules[name]
            if not isinstance(blocks, nn.ModuleList):
                raise ValueError(f"lesa: {path} must be an nn.ModuleList of blocks, got {type(blocks).__name__}")
            parent._modules[name] = SkippedBlocks(blocks)
            restored.callback(parent._modules.__setitem__, name, blocks)
        yield

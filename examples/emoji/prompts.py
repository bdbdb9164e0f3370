"""Says which emoji the demo compares methods on, and which others it learns from."""

from __future__ import annotations

from examples.emoji import emoji_model as emoji

SHOWN = (
    "CRYING CAT FACE",
    "GEM STONE",
    "BLACK TELEPHONE",
    "PINEAPPLE",
    "WRAPPED PRESENT",
    "BEER MUG",
)
"""Prompts of the picture, chosen by what the model draws of them in all its steps; of even numbers, see `_numbered`."""
UNSEEN_SEED, KNOWN_SEED = 0, 1_000_000
"""Seeds of the noise: that of all compared samples, and that of the first run to learn from; run r adds r."""


def compared_prompts(count: int) -> list[str]:
    """Return prompts that nothing is learned from: those shown, then others.

    Args:
        count: how many.
    """
    others = [prompt for prompt in _numbered(0) if prompt not in SHOWN]
    return [*SHOWN, *others][:count]


def known_prompts(count: int) -> list[str]:
    """Return prompts to learn from.

    Args:
        count: how many.
    """
    return _numbered(1)[:count]


def _numbered(first: int) -> list[str]:
    """Return every other name from the first on; neighbors in the list are alike, and a large stride parts them."""
    names = emoji.names()
    return [names[number * 389 % len(names)] for number in range(first, len(names), 2)]

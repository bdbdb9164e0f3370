"""Replaces the parts of pages that commands write."""

from __future__ import annotations

END = "<!-- end of what was made -->"


def mark(command: str) -> str:
    """Return the line after which a command writes."""
    return f"<!-- made by {command} -->"


def renewed(text: str, command: str, made: str) -> str:
    """Put what a command made between its mark and the end of it.

    Raises:
        ValueError: when the text does not hold the mark once, and after it the end.
    """
    before, begin, rest = text.partition(mark(command))
    _, end, after = rest.partition(END)
    if not begin or not end or begin in after:
        raise ValueError(f"text must hold {mark(command)} once, and after it {END}")
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"

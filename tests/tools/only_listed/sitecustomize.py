"""Hides every installed package but those of packages.txt, as if this were the machine that has just these.

What a listed package requires here stays too: another version of it may require something else there.

Python imports this module at its start when the folder is on PYTHONPATH. LESA_ALSO_LISTED names further packages.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _with_requirements(names: list[str]) -> set[str]:
    """Return packages and what they require, directly or not, extras left out."""
    found: set[str] = set()
    while names:
        name = _canonical(names.pop())
        if name in found:
            continue
        found.add(name)
        with suppress(importlib.metadata.PackageNotFoundError):
            wanted = importlib.metadata.requires(name) or []
            names += [re.split(r"[^\w.-]", line)[0] for line in wanted if "extra ==" not in line]
    return found


LISTED = {
    "lesa-kernels",  # the checkout itself
    *_with_requirements(Path(__file__).with_name("packages.txt").read_text().split()),
    *map(_canonical, os.environ.get("LESA_ALSO_LISTED", "").split()),
}
HIDDEN = {
    module
    for module, owners in importlib.metadata.packages_distributions().items()
    if not {_canonical(owner) for owner in owners} & LISTED
}


class ListedOnly(PathFinder):
    """Finds no module of a hidden package."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if path is None and fullname in HIDDEN:
            return None
        return super().find_spec(fullname, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = ListedOnly

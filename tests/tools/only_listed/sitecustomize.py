"""Hides every installed package that packages.txt does not list, as if this were the machine that has just these.

Python imports this module at its start when the folder is on PYTHONPATH. LESA_ALSO_LISTED names further packages.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


LISTED = {
    _canonical(name)
    for name in [
        *Path(__file__).with_name("packages.txt").read_text().split(),
        *os.environ.get("LESA_ALSO_LISTED", "").split(),
        "lesa-kernels",  # the checkout itself
    ]
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

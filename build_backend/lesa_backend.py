"""The build backend: setuptools, after a look whether there is a torch to build against.

The look comes first because pip would otherwise download torch, gigabytes with CUDA, before the build could say a word.
"""

from __future__ import annotations

from typing import Any

import lesa_toolchain
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that stay as they are)


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Return what a wheel's build needs beyond pyproject.toml; ends with one sentence if torch is missing."""
    if lesa_toolchain.needs_torch():
        lesa_toolchain.find_torch()
    return build_meta.get_requires_for_build_wheel(config_settings)


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Return what an editable build needs beyond pyproject.toml; ends with one sentence if torch is missing."""
    if lesa_toolchain.needs_torch():
        lesa_toolchain.find_torch()
    return build_meta.get_requires_for_build_editable(config_settings)

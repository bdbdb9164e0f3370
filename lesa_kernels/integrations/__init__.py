"""Hooks into other libraries: `lesa.enable(pipe)` for diffusers. Importing this package does not import diffusers."""

from lesa_kernels.integrations.adapters import Adapter, register_adapter
from lesa_kernels.integrations.api import default_schedule, disable, enable, enabled, summary
from lesa_kernels.integrations.recording import recorded
from lesa_kernels.integrations.runs import LesaWarning
from lesa_kernels.integrations.summaries import Summary

__all__ = [
    "Adapter",
    "LesaWarning",
    "Summary",
    "default_schedule",
    "disable",
    "enable",
    "enabled",
    "recorded",
    "register_adapter",
    "summary",
]

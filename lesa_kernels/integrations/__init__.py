"""Hooks into other libraries: `lesa.enable(pipe)` for diffusers. Importing this package does not import diffusers."""

from lesa_kernels.integrations.api import disable, enable, enabled, recorded, summary
from lesa_kernels.integrations.branches import LesaWarning
from lesa_kernels.integrations.models import Adapter, register_adapter
from lesa_kernels.integrations.pipeline_source import PipelineSource
from lesa_kernels.integrations.state import default_schedule
from lesa_kernels.integrations.stats import Summary

__all__ = [
    "Adapter",
    "LesaWarning",
    "PipelineSource",
    "Summary",
    "default_schedule",
    "disable",
    "enable",
    "enabled",
    "recorded",
    "register_adapter",
    "summary",
]

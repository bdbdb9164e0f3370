"""lesa-kernels: forecast a diffusion transformer's features on most steps instead of running its blocks.

The method is LESA (arXiv 2602.20497). Ops: `torch.ops.lesa.*`, see `lesa_kernels.ops` for what they mean.
"""

from lesa_kernels import ops as _ops  # noqa: F401 - importing declares the ops
from lesa_kernels.backends import load as _load
from lesa_kernels.backends import status
from lesa_kernels.integrations import LesaWarning, disable, enable, enabled, recorded, summary
from lesa_kernels.plan import Plan
from lesa_kernels.predictors import (
    HiCache,
    LesaPredictor,
    LinearPredictor,
    Predictor,
    Reuse,
    SolverPredictor,
    Spectrum,
    TaylorSeer,
    load_official,
    load_predictor,
)
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.session import Session

_load()

__all__ = [
    "HiCache",
    "LesaPredictor",
    "LesaWarning",
    "LinearPredictor",
    "Plan",
    "Predictor",
    "Reuse",
    "Schedule",
    "ScheduleRule",
    "Session",
    "SolverPredictor",
    "Spectrum",
    "TaylorSeer",
    "disable",
    "enable",
    "enabled",
    "load_official",
    "load_predictor",
    "recorded",
    "status",
    "summary",
]

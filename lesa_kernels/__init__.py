"""lesa-kernels: forecast a diffusion transformer's features on most steps instead of running its blocks (LESA, arXiv 2602.20497)."""

from lesa_kernels import ops as _ops
from lesa_kernels.plan import Plan
from lesa_kernels.predictors import Forecaster, LesaPredictor, Reuse, TaylorSeer, load_official
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.session import Session

__all__ = [
    "Forecaster",
    "LesaPredictor",
    "Plan",
    "Reuse",
    "Schedule",
    "ScheduleRule",
    "Session",
    "TaylorSeer",
    "load_official",
]

"""Sources of coefficients: LESA and the training-free forecasters."""

from lesa_kernels.predictors.base import Forecaster
from lesa_kernels.predictors.lesa import LesaPredictor
from lesa_kernels.predictors.official import load_official
from lesa_kernels.predictors.taylor import Reuse, TaylorSeer

__all__ = ["Forecaster", "LesaPredictor", "Reuse", "TaylorSeer", "load_official"]

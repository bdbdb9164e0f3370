"""Predictors: LESA, per-step coefficients, the learned solver, and those that need no training."""

from lesa_kernels.predictors.base import Predictor
from lesa_kernels.predictors.lesa import LesaPredictor
from lesa_kernels.predictors.linear import LinearPredictor
from lesa_kernels.predictors.official import load_official
from lesa_kernels.predictors.saved import load_predictor
from lesa_kernels.predictors.solver import SolverPredictor
from lesa_kernels.predictors.spectrum import Spectrum
from lesa_kernels.predictors.taylor import HiCache, Reuse, TaylorSeer

__all__ = [
    "HiCache",
    "LesaPredictor",
    "LinearPredictor",
    "Predictor",
    "Reuse",
    "SolverPredictor",
    "Spectrum",
    "TaylorSeer",
    "load_official",
    "load_predictor",
]

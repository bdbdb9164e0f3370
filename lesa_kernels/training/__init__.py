"""Learns predictors from runs of a model: LESA's training, fits through the tail, and the search for full steps."""

from lesa_kernels.training.config import TrainingConfig, TrainingResult
from lesa_kernels.training.lesa_fit import fit_lesa
from lesa_kernels.training.reports import plot_losses
from lesa_kernels.training.schedule_search import (
    Evaluator,
    FoundSchedule,
    Score,
    schedule_for_budget,
    search_schedule,
)
from lesa_kernels.training.solver_fit import SolverFits, fit_solver
from lesa_kernels.training.store import FeatureStore
from lesa_kernels.training.tail_fit import fit
from lesa_kernels.training.trainer import train
from lesa_kernels.trajectories import LoopSource, RecordedSource

__all__ = [
    "Evaluator",
    "FeatureStore",
    "FoundSchedule",
    "LoopSource",
    "RecordedSource",
    "Score",
    "SolverFits",
    "TrainingConfig",
    "TrainingResult",
    "fit",
    "fit_lesa",
    "fit_solver",
    "plot_losses",
    "schedule_for_budget",
    "search_schedule",
    "train",
]

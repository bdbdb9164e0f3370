"""Learns predictors from runs of a model: LESA's training, fits through the tail, and the search for full steps."""

from lesa_kernels.training.config import TrainingConfig, TrainingResult
from lesa_kernels.training.reports import plot_curve, plot_losses
from lesa_kernels.training.schedule_search import (
    Evaluator,
    FoundSchedule,
    even_schedules,
    fewest_calls,
    quality_curve,
    search_schedule,
)
from lesa_kernels.training.solver_fit import SolverFits, fit_solver
from lesa_kernels.training.store import FeatureStore
from lesa_kernels.training.tail_fit import fit
from lesa_kernels.training.trainer import train
from lesa_kernels.trajectories import LoopSource, RecordedSource, SelectedRuns

__all__ = [
    "Evaluator",
    "FeatureStore",
    "FoundSchedule",
    "LoopSource",
    "RecordedSource",
    "SelectedRuns",
    "SolverFits",
    "TrainingConfig",
    "TrainingResult",
    "even_schedules",
    "fewest_calls",
    "fit",
    "fit_solver",
    "plot_curve",
    "plot_losses",
    "quality_curve",
    "search_schedule",
    "train",
]

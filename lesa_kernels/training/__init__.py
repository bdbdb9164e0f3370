"""Learning predictors from runs of a model: the published training, fits of coefficients, and where full steps lie."""

from lesa_kernels.training.config import TrainingConfig, TrainingResult
from lesa_kernels.training.lesa_form import fit_lesa, segment_stages
from lesa_kernels.training.placement import Judge, Judged, Placement, plan_for_budget, search_placement
from lesa_kernels.training.plots import plot_losses
from lesa_kernels.training.store import FeatureStore
from lesa_kernels.training.through_tail import fit_through_tail
from lesa_kernels.training.trainer import train
from lesa_kernels.trajectories import LoopSource, RecordedSource

__all__ = [
    "FeatureStore",
    "Judge",
    "Judged",
    "LoopSource",
    "Placement",
    "RecordedSource",
    "TrainingConfig",
    "TrainingResult",
    "fit_lesa",
    "fit_through_tail",
    "plan_for_budget",
    "plot_losses",
    "search_placement",
    "segment_stages",
    "train",
]

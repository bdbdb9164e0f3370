"""Training a LESA predictor on features of unaccelerated runs."""

from lesa_kernels.training.plots import plot_losses
from lesa_kernels.training.published import TrainingConfig, TrainingResult, train

__all__ = ["TrainingConfig", "TrainingResult", "plot_losses", "train"]

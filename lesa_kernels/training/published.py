"""The published training of LESA (arXiv 2602.20497): on true history first, then on the predictor's own forecasts.

Both phases minimise the L1 distance to the feature of the unaccelerated run, one update a forecast step. Phase 1
("GT-guided") feeds true features back, phase 2 ("CL-AR", closed loop) the forecasts, detached, as at inference.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from lesa_kernels.contract import check_like
from lesa_kernels.ops import predict_l1_loss
from lesa_kernels.predictors import LesaPredictor
from lesa_kernels.schedule import Schedule, ScheduleRule

Phase = Literal["guided", "closed loop"]


@dataclass(frozen=True)
class TrainingConfig:
    """Hyper-parameters; the defaults are the published ones.

    Args:
        guided_epochs: passes over the trajectories with true history.
        closed_loop_epochs: passes with the predictor's own forecasts as history.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        clip_norm: largest norm of a gradient.
        decay: "step" multiplies the rate by `decay_factor` every `decay_every` updates; "cosine" lets it fall to
            `learning_rate * decay_factor` over a phase.
        decay_every: updates between two steps of the decay.
        decay_factor: see `decay`.
        restart_each_phase: a fresh optimiser and rate for each phase. Published: one for both, so that with many
            prompts the rate of phase 2 is almost nothing.
    """

    guided_epochs: int = 1
    closed_loop_epochs: int = 2
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    clip_norm: float = 1.0
    decay: Literal["step", "cosine"] = "step"
    decay_every: int = 500
    decay_factor: float = 0.5
    restart_each_phase: bool = False

    def __post_init__(self) -> None:
        for name in ("guided_epochs", "closed_loop_epochs", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm", "decay_every", "decay_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.decay not in ("step", "cosine"):
            raise ValueError(f'decay must be "step" or "cosine", got {self.decay!r}')


@dataclass
class TrainingResult:
    """What a training run leaves behind beside the trained predictor.

    Args:
        losses: mean L1 loss over a trajectory's forecasts, by phase, in order.
        seconds: how long it took.
        updates: optimiser updates.
    """

    losses: dict[Phase, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    updates: int = 0


@torch.enable_grad()
def train(
    predictor: LesaPredictor,
    trajectories: Sequence[Sequence[Tensor]],
    sigmas: Sequence[float],
    schedule: Schedule | ScheduleRule,
    config: TrainingConfig | None = None,
    *,
    progress: bool = True,
    description: str = "training",
) -> TrainingResult:
    """Train a predictor in place; from then on it is one for these sigmas.

    Args:
        predictor: float32 parameters, on the device of the features.
        trajectories: for each unaccelerated run its S features [*feature], in the order of the steps.
        sigmas: S+1 noise levels of those runs.
        schedule: where the full steps will lie at inference.
        config: hyper-parameters, None for the published ones.
        progress: show a bar with the loss.
        description: what the bar calls the run.

    Returns:
        Losses and times.

    Raises:
        ValueError: when there is no trajectory, one does not hold S features, or the plan forecasts no step.
        TypeError: when the parameters are not float32.
        FloatingPointError: when a loss is not finite; names the phase, trajectory and step.
    """
    config = config or TrainingConfig()
    levels = [float(sigma) for sigma in sigmas]
    full_steps = set(predictor.plan(levels, schedule, on_other_sigmas="adapt").full_steps)
    _check(predictor, trajectories, len(levels) - 1, full_steps)
    predictor.trained_sigmas = levels
    forecasts = len(levels) - 1 - len(full_steps)
    phases: list[tuple[Phase, int]] = [("guided", config.guided_epochs), ("closed loop", config.closed_loop_epochs)]
    result = TrainingResult()
    optimiser = _Optimiser(predictor, config)
    begin = time.perf_counter()
    columns = ("[progress.description]{task.description}", BarColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not progress) as bar:
        task = bar.add_task(description, total=sum(epochs for _, epochs in phases) * len(trajectories), loss="-")
        for phase, epochs in phases:
            optimiser.start_phase(epochs * len(trajectories) * forecasts)
            losses = result.losses.setdefault(phase, [])
            for index in range(epochs * len(trajectories)):
                number = index % len(trajectories)
                steps = _run(predictor, trajectories[number], levels, full_steps, phase == "closed loop", optimiser)
                losses.append(_mean_loss(steps, f"{phase} phase, trajectory {number}"))
                bar.update(task, advance=1, loss=f"{losses[-1]:.4f}", description=f"{description} ({phase})")
    result.seconds = time.perf_counter() - begin
    result.updates = optimiser.updates
    return result


def _check(
    predictor: LesaPredictor, trajectories: Sequence[Sequence[Tensor]], num_steps: int, full_steps: set[int]
) -> None:
    if not trajectories:
        raise ValueError("trajectories must hold at least one run, got none")
    for index, trajectory in enumerate(trajectories):
        if len(trajectory) != num_steps:
            raise ValueError(f"trajectories[{index}] must hold {num_steps} features, got {len(trajectory)}")
        for step, feature in enumerate(trajectory):
            check_like(
                "predict_l1", f"trajectories[{index}][{step}]", feature, f"trajectories[{index}][0]", trajectory[0]
            )
    if len(full_steps) == num_steps:
        raise ValueError("schedule must leave a step to forecast, got full steps only")
    for name, parameter in predictor.named_parameters():
        if parameter.dtype != torch.float32:
            raise TypeError(f"{name} must be float32 (low precision loses most updates), got {parameter.dtype}")


class _Optimiser:
    """AdamW, clipping and the decay of the rate."""

    def __init__(self, predictor: LesaPredictor, config: TrainingConfig) -> None:
        self._parameters = list(predictor.parameters())
        self._config = config
        self.updates = 0
        self._adam: torch.optim.AdamW | None = None
        self._decay: torch.optim.lr_scheduler.LRScheduler | None = None

    def start_phase(self, updates: int) -> None:
        """Begin a phase of so many updates; a new optimiser only where the configuration restarts each phase."""
        config = self._config
        if self._adam is None or config.restart_each_phase:
            self._adam = torch.optim.AdamW(
                self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay, foreach=True
            )
            self._decay = None
        if config.decay == "cosine":
            for group in self._adam.param_groups:
                group["lr"] = group["initial_lr"] = config.learning_rate
            self._decay = torch.optim.lr_scheduler.CosineAnnealingLR(
                self._adam, max(updates, 1), eta_min=config.learning_rate * config.decay_factor
            )
        elif self._decay is None:
            self._decay = torch.optim.lr_scheduler.StepLR(self._adam, config.decay_every, config.decay_factor)

    def update(self, loss: Tensor) -> None:
        """Take one step down the gradient of a loss."""
        if self._adam is None or self._decay is None:
            raise RuntimeError("start_phase must come before update")
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._config.clip_norm)
        self._adam.step()
        self._decay.step()
        self.updates += 1


def _run(
    predictor: LesaPredictor,
    trajectory: Sequence[Tensor],
    sigmas: Sequence[float],
    full_steps: set[int],
    closed_loop: bool,
    optimiser: _Optimiser,
) -> dict[int, Tensor]:
    """Train along one trajectory; return the loss of each forecast step, left on the device."""
    history: list[Tensor] = []
    losses: dict[int, Tensor] = {}
    for step, target in enumerate(trajectory):
        if step in full_steps:
            history.append(target)
            continue
        t = sigmas[step]
        out = torch.empty_like(target) if closed_loop else None
        loss = predict_l1_loss(history[-predictor.window(t) :], target, *predictor.parameters_at(sigmas, t), out=out)
        optimiser.update(loss)
        losses[step] = loss.detach()
        history.append(target if out is None else out)
    return losses


def _mean_loss(losses: dict[int, Tensor], where: str) -> float:
    """Return the mean loss, read from the device once a trajectory."""
    values = torch.stack(list(losses.values())).tolist()
    for step, value in zip(losses, values, strict=True):
        if not torch.isfinite(torch.tensor(value)):
            raise FloatingPointError(f"loss must be finite, got {value} at step {step} ({where})")
    return float(sum(values) / len(values))

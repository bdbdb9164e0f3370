"""Trains the predictor of one branch of guidance, one update a forecast step, while a run is sampled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from lesa_kernels.ops import predict_l1_loss
from lesa_kernels.ops.contract import check_like
from lesa_kernels.predictors import LesaPredictor
from lesa_kernels.ring import Ring
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.training.config import Batch, TrainingConfig
from lesa_kernels.training.ranks import Ranks

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class Learner:
    """One branch of a training: its predictor, the features that it forecasts from, and its optimizer.

    History lies in preallocated slots, nothing is stacked: step s in slot s % (K + 1), so the slot that a forecast is
    written to is never one that it is made from. All that changes from run to run is in `state`.

    The trainer reads `losses` and `norms` (of the gradients) of the batch's forecast steps, and the latest `rate`.

    Args:
        branch: of the guidance.
        predictor: float32 parameters; trained in place.
        sigmas: S+1 noise levels of the runs.
        schedule: the full steps at inference.
        config: hyper-parameters.
        ranks: the processes.

    Raises:
        ValueError: when the plan forecasts no step, or the parameters were made under `torch.inference_mode`.
        TypeError: when the parameters are not float32.
    """

    def __init__(
        self,
        branch: str,
        predictor: LesaPredictor,
        sigmas: Sequence[float],
        schedule: Schedule | ScheduleRule,
        config: TrainingConfig,
        ranks: Ranks,
    ) -> None:
        for name, parameter in predictor.named_parameters():
            if parameter.dtype != torch.float32:
                raise TypeError(f"{name} must be float32 (low precision loses most updates), got {parameter.dtype}")
            if parameter.is_inference():
                raise ValueError(f"{name} must be made outside of torch.inference_mode(): it could not be trained")
        self.branch = branch
        self.predictor = predictor
        self.schedule = Schedule(len(sigmas) - 1, predictor.plan(sigmas, schedule, on_other_sigmas="adapt").full_steps)
        self.forecasts = len(sigmas) - 1 - len(self.schedule.full_steps)
        if not self.forecasts:
            raise ValueError("schedule must leave a step to forecast, got full steps only")
        self._sigmas = sigmas
        self._config = config
        self._ranks = ranks
        self._num_slots = 1 + max(window for _, window in predictor.stages)
        self._ring: Ring | None = None
        self._parameters: dict[str, nn.Parameter] = dict(predictor.named_parameters())
        self._adam = _adam(list(self._parameters.values()), config)
        self.rate = config.learning_rate
        self.losses: dict[int, Tensor] = {}
        self.norms: list[Tensor] = []

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameters and AdamW's moments of each, by name: the tensors themselves, not copies."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"{self.branch}/parameter/{name}"] = parameter.data
            for moment in _MOMENTS:
                tensors[f"{self.branch}/{moment}/{name}"] = self._adam.state[parameter][moment]
        return tensors

    def begin(self, batch: Batch, index: int, *, inspect: bool = False) -> None:
        """Prepare for a batch of runs.

        Args:
            batch: the runs that will be sampled.
            index: batches before it in the whole training.
            inspect: look at every tensor, and raise FloatingPointError at the first that holds inf or NaN. Slow.
        """
        if batch.number == 0 and self._config.restart_each_phase:
            for parameter in self._parameters.values():
                for moment in _MOMENTS:
                    self._adam.state[parameter][moment].zero_()
        self._batch = batch
        self._index = index
        self._inspect = inspect
        self._latest_step = -1
        self.losses = {}
        self.norms = []

    def check_complete(self) -> None:
        """Raise a ValueError when a run did not reach its end."""
        if self._latest_step != self.schedule.num_steps - 1:
            raise ValueError(
                f"source must run all {self.schedule.num_steps} steps of branch {self.branch!r}, "
                f"the last was {self._latest_step}"
            )

    def learn(self, step: int, feature: Tensor) -> None:
        """Keep the true feature of a step, and learn to forecast it where the schedule does.

        Args:
            step: the one after the last.
            feature: [*feature], a constant.

        Raises:
            ValueError: when a step is left out, or the feature's shape or device changes within a run.
            TypeError: when its dtype does.
            FloatingPointError: see `begin`.
        """
        if step != self._latest_step + 1:
            raise ValueError(
                f"source must run every step once, in order: branch {self.branch!r} came to step {step} after step "
                f"{self._latest_step}"
            )
        self._latest_step = step
        ring = self._ring_for(step, feature)
        slot = step % self._num_slots
        if step in self.schedule.full_steps:
            ring.push(feature, slot)
            return
        t = self._sigmas[step]
        before = range(step - self.predictor.window(t), step)
        closed_loop = self._batch.phase == "closed loop"
        history = [ring[earlier % self._num_slots] for earlier in before]
        if self._inspect:
            self._look(step, self._inputs(before, history, feature))
        loss = predict_l1_loss(
            history, feature, *self.predictor.parameters_at(self._sigmas, t), out=ring[slot] if closed_loop else None
        )
        if self._inspect:
            self._look(step, [("the forecast", loss.detach())])
        self._update(step, loss)
        if not closed_loop:
            ring.push(feature, slot)

    def _update(self, step: int, loss: Tensor) -> None:
        """Take one step down the gradient."""
        done, length = len(self.losses), self._batch.phase_length * self.forecasts
        of_phase = self._batch.number * self.forecasts + done
        since_fresh = of_phase if self._config.restart_each_phase else self._index * self.forecasts + done
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        gradients = {name: p.grad for name, p in self._parameters.items() if p.grad is not None}
        self._ranks.average(list(gradients.values()))
        if self._inspect:
            self._look(step, [(f"the gradient of {name}", gradient) for name, gradient in gradients.items()])
        self.norms.append(torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self._config.clip_norm))
        self.rate = self._config.rate(since_fresh, of_phase, length)
        for group in self._adam.param_groups:
            group["lr"] = self.rate
        self._adam.step()
        self.losses[step] = loss.detach()

    def _ring_for(self, step: int, feature: Tensor) -> Ring:
        """Return the ring of slots, made anew where a run has features of another kind."""
        ring = self._ring
        if ring is None or (
            step == 0 and (ring.shape, ring.dtype, ring.device) != (tuple(feature.shape), feature.dtype, feature.device)
        ):
            self._ring = ring = Ring(self._num_slots, feature.shape, feature.dtype, feature.device)
        check_like("predict_l1", f"the feature of step {step} ({self._batch})", feature, "that of step 0", ring[0])
        return ring

    def _inputs(self, before: range, history: Sequence[Tensor], target: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors that a loss is computed from, by name."""
        yield "the target", target
        for k, (earlier, feature) in enumerate(zip(before, history, strict=True)):
            kept = earlier in self.schedule.full_steps or self._batch.phase == "teacher forcing"
            yield f"history[{k}] (the {'feature' if kept else 'forecast'} of step {earlier})", feature
        for name, parameter in self._parameters.items():
            yield f"the parameter {name}", parameter

    def _look(self, step: int, tensors: Iterator[tuple[str, Tensor]] | Sequence[tuple[str, Tensor]]) -> None:
        """Raise, in all processes, at the first tensor that is not finite in any of them."""
        bad = next((name for name, tensor in tensors if not torch.isfinite(tensor).all()), None)
        where = None if bad is None else f"{bad} is not finite at step {step} of branch {self.branch!r} ({self._batch})"
        if (found := self._ranks.first_of(where)) is not None:
            raise FloatingPointError(found)


def _adam(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW whose state exists before the first update, so that checkpoints always hold the same tensors."""
    fused = parameters[0].device.type in ("cpu", "cuda")
    adam = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused)
    for parameter in parameters:
        adam.state[parameter] = {
            # The fused form counts where the parameters are, the others on the host.
            "step": torch.zeros((), device=parameter.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return adam

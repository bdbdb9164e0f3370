"""Trains LESA as published (arXiv 2602.20497): with teacher forcing first, then on the predictor's own forecasts.

Both phases minimize the L1 distance to the feature of the unaccelerated run, one update a forecast step. Phase 1
("GT-guided" in the paper) feeds true features back, phase 2 ("CL-AR", closed loop) the forecasts, detached, as at
inference. Training is a `StepPolicy`: it learns while the model samples, and keeps no more than a window of features.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.checks import check_type
from lesa_kernels.machine import MANY_ELEMENTS, one_thread
from lesa_kernels.predictors import LesaPredictor
from lesa_kernels.schedule import Schedule, ScheduleRule
from lesa_kernels.training.checkpoint import Checkpoint
from lesa_kernels.training.config import Batch, TrainingConfig, TrainingResult, all_batches, losses_by_phase
from lesa_kernels.training.learner import Learner
from lesa_kernels.training.progress import progress_bar
from lesa_kernels.training.ranks import Ranks, lock_folder
from lesa_kernels.training.reports import Scalars, check_reports, save_predictors, write_losses
from lesa_kernels.trajectories import ONLY_BRANCH, ModelCall, TrajectorySource, check_single_model, check_source, watch


@torch.inference_mode(False)
def train(
    predictor: LesaPredictor | Mapping[str, LesaPredictor],
    source: TrajectorySource,
    schedule: Schedule | ScheduleRule,
    config: TrainingConfig | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    description: str = "training",
    tensorboard: bool = False,
    save_seconds: float = 30.0,
) -> TrainingResult:
    """Train a predictor in place; from then on it belongs to the source's sigmas.

    With `out`, a training that was stopped or killed goes on where it was last saved when this is called again with the
    same arguments, and gives the same bits as one that was not; one that is finished returns its result. What stops it
    (a non-finite loss, Ctrl-C, an error of the source) leaves the predictor as the last complete batch made it.

    Under `torch.distributed` each process runs its share of a batch, gradients are averaged, rank 0 writes.

    Args:
        predictor: float32 parameters, on the device of the features; or one for each branch of guidance, by name. The
            calls of a branch without a predictor run in full.
        source: the runs.
        schedule: the full steps at inference.
        config: hyper-parameters, None for the published ones.
        out: folder for the checkpoint, `losses.csv`, `loss.png` and the predictor (several: in folders of their
            branches), all of which are there from the first checkpoint on; None writes nothing.
        progress: show a bar with the loss.
        description: name of the training for the bar and the plot.
        tensorboard: write scalars to `out/tensorboard`.
        save_seconds: time between checkpoints; 0 saves after every batch.

    Returns:
        Losses and times.

    Raises:
        ValueError: when the source has no run, does not run all steps of a branch, or cannot be split over the
            processes; when the plan forecasts no step, the parameters were made under `torch.inference_mode`, or `out`
            holds a training with other arguments.
        BlockingIOError: when another process trains in `out`.
        OSError: when `out` cannot be written to, before anything is trained; or when the disk is full, which leaves the
            last checkpoint as it was.
        TypeError: when the parameters are not float32.
        FloatingPointError: when a loss is not finite; names the tensor, step, branch, phase and run.
        ModuleNotFoundError: when a package for what is to be written is missing.
        RuntimeError: when torchrun started this process and torch.distributed is not initialized.
    """
    config = TrainingConfig() if config is None else config
    ranks = Ranks()
    folder = None if out is None else Path(out)
    training = _Training(predictor, source, schedule, config, ranks)
    check_reports(folder, tensorboard, list(training.predictors))
    with ExitStack() as stack:
        if folder is not None:
            ranks.from_first(lambda: stack.enter_context(lock_folder(folder)))
        checkpoint = ranks.from_first(lambda: training.checkpoint_in(folder))
        training.restore(checkpoint)
        remaining = training.batches[training.done :]
        if not remaining:
            return training.result()
        writes_to = folder if ranks.writes else None
        scalars = stack.enter_context(Scalars(writes_to if tensorboard else None, training.done))
        if writes_to is not None:
            stack.callback(training.save, writes_to, description)
        bar = stack.enter_context(progress_bar(progress and ranks.writes))
        task = bar.add_task(description, total=len(training.batches), completed=training.done)
        saved = time.monotonic()
        for batch in remaining:
            loss, rate = training.run(batch)
            scalars.add(training.done - 1, batch, loss, rate)
            bar.update(task, advance=1, description=f"{description} ({batch.phase}), loss {loss:.4f}")
            if writes_to is not None and time.monotonic() - saved >= save_seconds:
                training.save(writes_to, description)
                saved = time.monotonic()
    return training.result()


class _Training:
    """The state of a training between two batches; the arguments are those of `train`."""

    def __init__(
        self,
        predictor: LesaPredictor | Mapping[str, LesaPredictor],
        source: TrajectorySource,
        schedule: Schedule | ScheduleRule,
        config: TrainingConfig,
        ranks: Ranks,
    ) -> None:
        check_type("config", config, TrainingConfig, "a TrainingConfig")
        check_type("predictor", predictor, (LesaPredictor, Mapping), "a LesaPredictor or a mapping of them")
        self.predictors = {ONLY_BRANCH: predictor} if isinstance(predictor, LesaPredictor) else dict(predictor)
        if not self.predictors:
            raise ValueError("predictor must name at least one branch, got none")
        for branch, each in self.predictors.items():
            check_type(f"predictor[{branch!r}]", each, LesaPredictor, "a LesaPredictor")
        check_source(source)
        ranks.check(len(source), config.batch_size)
        self.batches = all_batches(config, len(source))
        self._source = source
        self._config = config
        self._ranks = ranks
        self._learners = {
            branch: Learner(branch, own, source.sigmas, schedule, config, ranks)
            for branch, own in self.predictors.items()
        }
        self._state = {name: tensor for learner in self._learners.values() for name, tensor in learner.state.items()}
        self._good = {name: tensor.clone() for name, tensor in self._state.items()}
        self._losses: list[float] = []
        self._seconds = 0.0

    @property
    def done(self) -> int:
        """Batches that are done."""
        return len(self._losses)

    @property
    def _settings(self) -> dict[str, Any]:
        """All that the result depends on; the process count is not in it, it changes roundings alone."""
        return {
            "sigmas": list(self._source.sigmas),
            "the number of runs of source": len(self._source),
            "source.model": getattr(self._source, "model", None),
            "source.identity": getattr(self._source, "identity", None),
            "config": asdict(self._config),
            "predictor": {
                branch: {
                    "stages": learner.predictor.stages,
                    "full steps": learner.schedule.full_steps,
                    "shapes": {name: tuple(tensor.shape) for name, tensor in learner.predictor.state_dict().items()},
                }
                for branch, learner in self._learners.items()
            },
        }

    def checkpoint_in(self, folder: Path | None) -> Checkpoint:
        """Return the checkpoint of a folder, or the present state where there is none; refuse another training's."""
        settings = self._settings
        found = None if folder is None else Checkpoint.load(folder)
        # A training that failed in its first batch leaves its folder free for any other.
        if folder is not None and found is not None and found.losses:
            found.check(settings, self._state, len(self.batches), folder)
            return found
        return Checkpoint(settings, {name: tensor.cpu() for name, tensor in self._state.items()})

    @torch.no_grad()
    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state of a checkpoint."""
        for name, tensor in self._state.items():
            tensor.copy_(checkpoint.tensors[name])
        _copy(self._state, self._good)
        self._losses = list(checkpoint.losses)
        self._seconds = checkpoint.seconds
        for learner in self._learners.values():
            learner.predictor.trained_sigmas = self._source.sigmas
            learner.predictor.trained_schedule = learner.schedule

    def save(self, folder: Path, description: str) -> None:
        """Write the state after the last complete batch, and the reports."""
        save_predictors(self.predictors, folder)
        write_losses(folder, self.batches, self._losses, description)
        # Last: where a checkpoint is finished, the other files must be there.
        Checkpoint(self._settings, self._good, self._losses, self._seconds).save(folder)

    def result(self) -> TrainingResult:
        """Return the losses and times so far."""
        updates = self.done * sum(learner.forecasts for learner in self._learners.values())
        return TrainingResult(losses_by_phase(self.batches, self._losses), self._seconds, updates)

    def run(self, batch: Batch) -> tuple[float, float]:
        """Train on a batch; return the mean loss and the last learning rate. An error restores the state before it."""
        begin = time.perf_counter()
        try:
            self._run_batch(batch)
            loss = self._mean_loss(batch)
        except BaseException:
            _copy(self._good, self._state)
            raise
        _copy(self._state, self._good)
        self._losses.append(loss)
        self._seconds += time.perf_counter() - begin
        return loss, next(iter(self._learners.values())).rate

    def _run_batch(self, batch: Batch, *, inspect: bool = False) -> None:
        """Sample a batch of runs, and learn from every call."""
        for learner in self._learners.values():
            learner.begin(batch, self.done, inspect=inspect)

        def policy(call: ModelCall) -> Tensor | None:
            check_single_model(call)
            feature, output = watch(call)
            if (learner := self._learners.get(call.branch)) is not None:
                # Sources may sample in inference mode, under autocast and without gradients.
                with (
                    one_thread() if feature.numel() < MANY_ELEMENTS else nullcontext(),
                    torch.inference_mode(False),
                    torch.enable_grad(),
                    torch.autocast(feature.device.type, enabled=False),
                ):
                    learner.learn(call.step, feature.detach())
            return output

        with torch.no_grad():
            self._source.run(self._ranks.share_of(batch.runs), policy)
        for learner in self._learners.values():
            learner.check_complete()

    def _mean_loss(self, batch: Batch) -> float:
        """Read the losses from the device, once a batch."""
        learners = self._learners.values()
        losses = torch.stack([loss.float() for learner in learners for loss in learner.losses.values()])
        self._ranks.average([losses])
        norms = torch.stack([norm for learner in learners for norm in learner.norms])
        values = torch.cat([losses, norms]).tolist()
        if not all(map(math.isfinite, values)):
            self._name_what_is_not_finite(batch)
        return float(sum(values[: len(losses)]) / len(losses))

    def _name_what_is_not_finite(self, batch: Batch) -> None:
        """Run a batch again and look at every tensor, which is slow, to raise an error that names it."""
        first = next(
            (
                f"step {step} of branch {learner.branch!r}"
                for learner in self._learners.values()
                for step, loss in learner.losses.items()
                if not loss.isfinite()
            ),
            "a step whose gradient is not",
        )
        _copy(self._good, self._state)
        self._run_batch(batch, inspect=True)
        raise FloatingPointError(
            f"a loss was not finite at {first} ({batch}); sampled again the source gave other features, all finite"
        )


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Copy tensors, in few launches."""
    torch._foreach_copy_(list(target.values()), list(source.values()))

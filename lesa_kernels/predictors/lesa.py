"""Forecasts by LESA (arXiv 2602.20497): for each noise range mixing weights, a bias, and a KAN for the gain."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lesa_kernels.checks import check_decreasing, check_float, check_int, check_list, check_type
from lesa_kernels.ops.contract import MAX_HISTORY, check_dense
from lesa_kernels.ops.predict import check_predict
from lesa_kernels.plan import Row, RowRule
from lesa_kernels.predictors.base import Predictor, sigmas_incompatibility
from lesa_kernels.predictors.kan_network import GRID_SIZE, KAN, SPLINE_ORDER
from lesa_kernels.predictors.saved import Saved
from lesa_kernels.schedule import MAX_STEPS, Schedule

PUBLISHED_STAGES = ((0.9, 4), (0.5, 8), (0.0, 8))
"""(threshold, K) of FLUX and HunyuanVideo: a stage serves sigmas above its threshold, the last one all that is left."""

# A config that asks for more than these is damaged, or means harm.
MAX_STAGES = 1000
MAX_WIDTH = 65_536  # of the KANs: hidden units, knots, and the order of the splines


class LesaPredictor(
    Saved,
    Predictor,
    library_name="lesa-kernels",
    paper_url="https://arxiv.org/abs/2602.20497",
    tags=["feature-caching", "diffusion"],
):
    """LESA: forecast = h[s-1] + gain * (sum_k w[k] * h[s-K+k] + b), gain = KAN(t_s - t_0, ..., t_s - t_S).

    State keys are those of a released checkpoint without a branch's suffix: `latent.{stage}.weight` [1, K],
    `latent.{stage}.bias` [1], `timestep.{stage}.layers.{i}.{grid, base_weight, spline_weight, spline_scaler}`. Keep the
    parameters in float32 whatever the features are: bfloat16 loses most updates at the published learning rate.

    `save_pretrained(folder)` writes safetensors and config.json, `from_pretrained(folder_or_hub_id)` reads them.

    Args:
        num_steps: S; the KAN takes the S+1 sigmas of a schedule.
        stages: (threshold, K) from high noise to low: a stage serves t > threshold (strict), the last one the rest.
        hidden_dim: width of the KAN's two hidden layers.
        grid_size: intervals of its spline grid.
        spline_order: order of its B-splines.
        trained_sigmas: the S+1 noise levels of its training, None where they are not known. `plan` refuses others;
            saved with the weights.
        full_steps: of the schedule that it was trained for, None where that is not known. `plan` takes them where no
            schedule is given; saved with the weights.

    Raises:
        ValueError: for a count out of range, thresholds that do not fall, or not S+1 falling sigmas.
    """

    def __init__(
        self,
        num_steps: int,
        stages: Sequence[Sequence[float]] = PUBLISHED_STAGES,
        hidden_dim: int = 256,
        grid_size: int = GRID_SIZE,
        spline_order: int = SPLINE_ORDER,
        trained_sigmas: Sequence[float] | None = None,
        full_steps: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.num_steps = check_int("num_steps", num_steps, 1, MAX_STEPS)
        hidden_dim = check_int("hidden_dim", hidden_dim, 1, MAX_WIDTH)
        grid_size = check_int("grid_size", grid_size, 1, MAX_WIDTH)
        spline_order = check_int("spline_order", spline_order, 0, MAX_WIDTH)
        pairs = check_list("stages", stages, "pairs of threshold and history")
        for index, stage in enumerate(pairs):
            if not isinstance(stage, Sequence) or len(stage) != 2:
                raise ValueError(f"stages[{index}] must be a pair of threshold and history, got {reprlib.repr(stage)}")
            check_float(f"threshold of stages[{index}]", stage[0])
            window = check_float(f"history of stages[{index}]", stage[1])
            if window != int(window) or not 1 <= window <= MAX_HISTORY:
                raise ValueError(f"stages[{index}] must have a history of 1 to {MAX_HISTORY} features, got {window}")
        self.stages = tuple((float(threshold), int(window)) for threshold, window in pairs)
        thresholds = [threshold for threshold, _ in self.stages]
        if len(thresholds) > MAX_STAGES:
            raise ValueError(f"stages must be at most {MAX_STAGES}, got {len(thresholds)}")
        if not thresholds or any(low >= high for high, low in itertools.pairwise(thresholds)):
            raise ValueError(f"stages must have falling thresholds, got {thresholds}")
        widths = (self.num_steps + 1, hidden_dim, hidden_dim, 1)
        self.latent = nn.ModuleList(nn.Linear(window, 1) for _, window in self.stages)
        self.timestep = nn.ModuleList(KAN(widths, grid_size, spline_order) for _ in self.stages)
        self.trained_sigmas = trained_sigmas
        self.trained_schedule = None if full_steps is None else Schedule(self.num_steps, full_steps)  # type: ignore[arg-type]

    @property
    def trained_sigmas(self) -> tuple[float, ...] | None:
        """The S+1 noise levels of the training, None where they are not known. Training sets them."""
        return self._trained_sigmas

    @trained_sigmas.setter
    def trained_sigmas(self, sigmas: Sequence[float] | None) -> None:
        self._trained_sigmas = None if sigmas is None else check_decreasing(sigmas, "trained_sigmas")
        if self._trained_sigmas is not None and len(self._trained_sigmas) != self.num_steps + 1:
            raise ValueError(
                f"trained_sigmas must hold num_steps + 1 = {self.num_steps + 1} values, got {len(self._trained_sigmas)}"
            )
        self._note_config(trained_sigmas=self._trained_sigmas)

    @property
    def trained_schedule(self) -> Schedule | None:
        """The schedule of the training, None where it is not known. Training sets it."""
        return self._trained_schedule

    @trained_schedule.setter
    def trained_schedule(self, schedule: Schedule | None) -> None:
        if schedule is not None and schedule.num_steps != self.num_steps:
            raise ValueError(f"trained_schedule must have {self.num_steps} steps, got {schedule.num_steps}")
        self._trained_schedule = schedule
        self._note_config(full_steps=None if schedule is None else list(schedule.full_steps))

    @property
    def schedule(self) -> Schedule | None:
        """See `Predictor.schedule`."""
        return self._trained_schedule

    def _note_config(self, **entries: object) -> None:
        # The mixin writes to config.json what the constructor was given.
        config = {} if self._hub_mixin_config is None else cast(dict[str, Any], self._hub_mixin_config)
        self._hub_mixin_config = config | entries

    def incompatibility(self, sigmas: Sequence[float]) -> str | None:
        """See `Predictor.incompatibility`; another number of sigmas is refused by `rows`, whatever the training was."""
        return sigmas_incompatibility(self._trained_sigmas, sigmas)

    def stage(self, t: float) -> int:
        """Return the number of the stage that serves a noise level.

        Args:
            t: noise level of the step to forecast.
        """
        for index, (threshold, _) in enumerate(self.stages[:-1]):
            if t > threshold:
                return index
        return len(self.stages) - 1

    def window(self, t: float) -> int:
        """Return K of the stage that serves a noise level.

        Args:
            t: noise level of the step to forecast.
        """
        return self.stages[self.stage(t)][1]

    def gain(self, sigmas: Sequence[float] | Tensor, t: float | Iterable[float], stage: int) -> Tensor:
        """Return a stage's gain.

        Args:
            sigmas: [S+1] noise levels.
            t: noise level of the step, or those of T steps.
            stage: which KAN.

        Returns:
            [1], or [T, 1]; differentiable in the KAN's parameters.

        Raises:
            ValueError: when there are not S+1 sigmas.
        """
        kan = cast(KAN, self.timestep[check_int("stage", stage, 0, len(self.stages) - 1)])
        levels = self._levels(sigmas)
        times = [t] if isinstance(t, (int, float)) else list(t)
        now = torch.tensor(times, dtype=torch.float64, device=levels.device)
        # Differences in float64: neighbouring sigmas of long schedules lie close together.
        # They come from the host: a blocking copy would make every forecast of a training wait for the GPU.
        differences = (now.unsqueeze(-1) - levels).to(next(kan.parameters()), non_blocking=True)
        gains: Tensor = kan(differences)
        return gains[0] if isinstance(t, (int, float)) else gains

    def _levels(self, sigmas: Sequence[float] | Tensor) -> Tensor:
        try:
            levels = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").reshape(-1)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"sigmas must be numbers, got {reprlib.repr(sigmas)}") from error
        if levels.numel() != self.num_steps + 1:
            raise ValueError(
                f"sigmas must hold num_steps + 1 = {self.num_steps + 1} values (use scheduler.sigmas), "
                f"got {levels.numel()}"
            )
        return levels

    def parameters_at(self, sigmas: Sequence[float] | Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """Return what `torch.ops.lesa.predict` takes at a noise level.

        Args:
            sigmas: [S+1] noise levels.
            t: noise level of the step to forecast.

        Returns:
            Weight [K], bias [1] and gain [1], differentiable.
        """
        t = float(t)
        stage = self.stage(t)
        mixer = cast(nn.Linear, self.latent[stage])
        return mixer.weight.reshape(-1), mixer.bias, self.gain(sigmas, t, stage)

    def forward(self, history: Sequence[Tensor], sigmas: Sequence[float] | Tensor, t: float) -> Tensor:
        """Forecast one feature, differentiable in the parameters and the history.

        Args:
            history: at least K features [*feature], newest last; the last K are taken.
            sigmas: [S+1] noise levels.
            t: noise level of the step to forecast.

        Returns:
            [*feature].

        Raises:
            ValueError: when the history is shorter than the stage's K, its features differ in shape or lie elsewhere
                than the parameters, or there are not S+1 sigmas.
            TypeError: when the history holds anything else than dense features of one dtype.
        """
        t = float(t)
        window = self.window(t)
        check_type("history", history, (Sequence, Tensor), "a sequence of features")
        if len(history) < window:
            raise ValueError(f"history must hold at least {window} features at t = {t}, got {len(history)}")
        features = list(history[-window:])
        for k, feature in enumerate(features):
            check_type(f"history[{k}]", feature, Tensor, "a tensor")
        parameters = self.parameters_at(sigmas, t)
        check_dense("predict", "history", features)
        check_predict("predict", features, *parameters)
        result: Tensor = torch.ops.lesa.predict(features, *parameters)
        return result

    @torch.no_grad()
    def rows(self, sigmas: Sequence[float]) -> RowRule:
        """See `Predictor.rows`. All gains are computed at once, so that planning costs one synchronisation a stage.

        Raises:
            ValueError: when there are not S+1 sigmas.
        """
        levels = [float(sigma) for sigma in self._levels(sigmas)]
        stages = [self.stage(t) for t in levels[:-1]]
        gains: dict[int, float] = {}
        for stage in sorted(set(stages)):
            steps = [step for step, own in enumerate(stages) if own == stage]
            values = self.gain(levels, [levels[step] for step in steps], stage).reshape(-1).tolist()
            gains.update(zip(steps, values, strict=True))
        mixers = [cast(nn.Linear, mixer) for mixer in self.latent]
        weights = [mixer.weight.reshape(-1).tolist() for mixer in mixers]
        biases = [mixer.bias.item() for mixer in mixers]

        def row(step: int, full_steps: Sequence[int]) -> Row | None:
            stage = stages[step]
            window = len(weights[stage])
            if step - full_steps[0] < window:
                return None
            terms = {step - window + k: gains[step] * weight for k, weight in enumerate(weights[stage])}
            terms[step - 1] += 1.0
            return Row(terms, gains[step] * biases[stage])

        return row

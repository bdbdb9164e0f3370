"""Forecasts with coefficients of its own for every step: the result of fits, and the form of L2P (arXiv 2604.26365)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.checks import check_decreasing
from lesa_kernels.ops.contract import MAX_HISTORY
from lesa_kernels.plan import Row, RowRule
from lesa_kernels.predictors.base import Predictor, sigmas_incompatibility
from lesa_kernels.predictors.saved import Saved
from lesa_kernels.schedule import Schedule


class LinearPredictor(
    Saved,
    Predictor,
    library_name="lesa-kernels",
    paper_url="https://arxiv.org/abs/2604.26365",
    tags=["feature-caching", "diffusion"],
):
    """Per-step coefficients: forecast of step s = sum_k coefficients[s, k] * feature_k + offsets[s].

    The features are those of the last `window` *full* steps, or with `over_all` of the last `window` steps, full and
    forecast alike; newest last, so with a shorter history the last columns count. The coefficients are made for one set
    of full steps, `schedule`, and one set of sigmas. Under another schedule a step runs full where one of the features
    that its coefficients are for is missing, or where there are none for it (NaN).

    `save_pretrained(folder)` writes safetensors and config.json, `from_pretrained(folder_or_hub_id)` reads them.

    Args:
        sigmas: S+1 falling noise levels.
        full_steps: of the schedule that the coefficients are made for.
        window: K, most features that a forecast reads, 1 to 64.
        over_all: whether forecast steps count as history too.

    Raises:
        ValueError: when the sigmas do not fall, the full steps are no schedule, or the window is out of range.
    """

    coefficients: Tensor
    offsets: Tensor

    def __init__(
        self, sigmas: Sequence[float], full_steps: Sequence[int], window: int = 3, over_all: bool = False
    ) -> None:
        super().__init__()
        self.trained_sigmas = check_decreasing(sigmas)
        if isinstance(window, bool) or not isinstance(window, int) or not 1 <= window <= MAX_HISTORY:
            raise ValueError(f"window must be 1 to {MAX_HISTORY} features, got {window!r}")
        self._schedule = Schedule(len(self.trained_sigmas) - 1, full_steps)  # type: ignore[arg-type]
        self.window = window
        self.over_all = over_all
        steps = self._schedule.num_steps
        self.register_buffer("coefficients", torch.full((steps, window), torch.nan, dtype=torch.float64))
        self.register_buffer("offsets", torch.zeros(steps, dtype=torch.float64))
        self._hub_mixin_config: dict[str, Any] = {
            "predictor": "LinearPredictor",
            "sigmas": list(self.trained_sigmas),
            "full_steps": list(self._schedule.full_steps),
            "window": window,
            "over_all": over_all,
        }

    @classmethod
    def from_rows(
        cls,
        sigmas: Sequence[float],
        schedule: Schedule,
        rows: Mapping[int, Row],
        window: int = 3,
        over_all: bool = False,
    ) -> LinearPredictor:
        """Make a predictor from the rows of its forecast steps.

        Args:
            sigmas: S+1 falling noise levels.
            schedule: its full steps.
            rows: of each forecast step, over features that lie within the window; what is missing runs full.
            window: K.
            over_all: see the class.

        Returns:
            The predictor.

        Raises:
            ValueError: when a row reads a feature that is not in its window.
        """
        predictor = cls(sigmas, schedule.full_steps, window, over_all)
        for step, row in rows.items():
            sources = predictor.sources(step)
            if not set(row.terms) <= set(sources):
                raise ValueError(f"rows[{step}] must read features of steps {sources} only, got {sorted(row.terms)}")
            values = [row.terms.get(source, 0.0) for source in sources]
            predictor.coefficients[step] = 0.0
            predictor.coefficients[step, window - len(values) :] = torch.tensor(values, dtype=torch.float64)
            predictor.offsets[step] = row.offset
        return predictor

    @property
    def schedule(self) -> Schedule:
        """The full steps that the coefficients were made for."""
        return self._schedule

    def sources(self, step: int) -> list[int]:
        """Return the steps whose features a forecast reads, oldest first.

        Args:
            step: of the forecast.
        """
        if self.over_all:
            return list(range(max(step - self.window, 0), step))
        return [full for full in self._schedule.full_steps if full < step][-self.window :]

    def incompatibility(self, sigmas: Sequence[float]) -> str | None:
        """See `Predictor.incompatibility`."""
        return sigmas_incompatibility(self.trained_sigmas, sigmas)

    @torch.no_grad()
    def rows(self, sigmas: Sequence[float]) -> RowRule:
        """See `Predictor.rows`.

        Raises:
            ValueError: when there are not S+1 sigmas.
        """
        if len(sigmas) != len(self.trained_sigmas):
            raise ValueError(f"sigmas must hold {len(self.trained_sigmas)} values, got {len(sigmas)}")
        coefficients, offsets = self.coefficients.tolist(), self.offsets.tolist()

        def row(step: int, full_steps: Sequence[int]) -> Row | None:
            sources = self.sources(step)
            used = coefficients[step][self.window - len(sources) :]
            known = range(full_steps[0], step) if self.over_all else full_steps
            if not set(sources) <= set(known) or any(math.isnan(value) for value in used):
                return None
            return Row(dict(zip(sources, used, strict=True)), offsets[step])

        return row

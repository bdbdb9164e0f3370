"""Keeps the histories of two branches of guidance that one call of the model holds, as the halves of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.guidance import is_doubled
from lesa_kernels.integrations.outputs import only_tensor
from lesa_kernels.plan import Plan
from lesa_kernels.session import Session


class HalvesSession:
    """A session of each half of a batch, used as one.

    Args:
        plans: of the first and of the second half.
        history_dtype: see `Session`.

    Raises:
        ValueError: when their full steps differ.
    """

    def __init__(self, plans: Sequence[Plan], history_dtype: torch.dtype | None) -> None:
        if len({plan.full_steps for plan in plans}) > 1:
            raise ValueError(
                "predictors of one call must have the same full steps, got "
                f"{' and '.join(str(plan.full_steps) for plan in plans)}"
            )
        self.plan = plans[0]
        self.sessions = tuple(Session(plan, history_dtype=history_dtype) for plan in plans)

    @property
    def errors(self) -> dict[int, Tensor]:
        """See `Session.errors`; the larger one of the halves."""
        first, second = (session.errors for session in self.sessions)
        return {step: torch.maximum(error, second[step]) for step, error in first.items()}

    def push(self, step: int, feature: Tensor) -> None:
        """See `Session.push`."""
        for session, half in zip(self.sessions, feature.chunk(2), strict=True):
            session.push(step, half)

    def forecast(self, step: int) -> Tensor:
        """See `Session.forecast`; a tensor of its own, as the halves lie in two rings."""
        return torch.cat([session.forecast(step) for session in self.sessions])


def are_equal_halves(latents: Any) -> bool:
    """Whether a model's first argument holds the same latents twice; waits for the device."""
    tensor = only_tensor(latents)
    return tensor is not None and is_doubled(tensor)

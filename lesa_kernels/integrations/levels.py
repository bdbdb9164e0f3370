"""Reads a scheduler: the noise levels and timesteps of a run, and why it cannot be forecast.

Forecasts are placed at levels that fall from at most 1 to 0. Under flow matching these are the sigmas. Other sigmas
span orders of magnitude, and the network is told something else: one of the timesteps of its training (DDPM and its
kin), log(sigma) / 4 (EDM, arXiv 2206.00364) or sigma / (1 + sigma) (Cosmos-Predict2).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Flow matching goes from 1 to 0; the sigmas of other schedulers go far beyond, on another scale.
_MAX_FLOW_SIGMA = 1.001


@dataclass(frozen=True)
class Levels:
    """What a scheduler lists for one run.

    Args:
        sigmas: S+1 noise levels that forecasts are placed at, falling from at most 1 to 0; where `incompatibility` says
            why not, whatever could be read.
        timesteps: the S timesteps that the scheduler hands to the model, empty where it lists none or others.
        incompatibility: why no step can be forecast, None where nothing is against it.
    """

    sigmas: tuple[float, ...]
    timesteps: tuple[float, ...] = ()
    incompatibility: str | None = None


def has_index(scheduler: Any) -> bool:
    """Whether a scheduler has sigmas and knows its step; the calls of others are counted."""
    return hasattr(scheduler, "sigmas") and hasattr(scheduler, "step_index")


def read_levels(scheduler: Any) -> Levels:
    """Read the noise levels of the run that begins; on a GPU this is the one wait of a run.

    Sigmas within [0, 1] are the levels as they are. Timesteps below the number of those in training, T, are levels
    (t + 1) / T, and 0. Sigmas without such timesteps, or that differ where the rounded timesteps do not, are levels
    sigma / (1 + sigma), and 0.

    Args:
        scheduler: one of diffusers', or of a user's with the same attributes; `set_timesteps` was called.

    Returns:
        The levels; `incompatibility` names the scheduler's class.
    """
    name = type(scheduler).__name__
    try:
        listed = getattr(scheduler, "timesteps", None)
        sigmas, timesteps = _floats(scheduler.sigmas if has_index(scheduler) else (), () if listed is None else listed)
        levels = _levels(scheduler, sigmas, timesteps)
    # Whatever a scheduler holds before set_timesteps.
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        return Levels((), (), f"the noise levels cannot be read from {name}: {error}")
    order = getattr(scheduler, "order", 1)
    reason = None
    if isinstance(order, int) and order > 1:
        reason = f"{name} takes steps of order {order}, which call the model {order} times"
    elif not all(math.isfinite(level) for level in levels):
        reason = f"{name} lists noise levels that are not finite"
    elif any(later >= earlier for earlier, later in itertools.pairwise(levels)):
        reason = f"{name} lists noise levels that repeat or rise"
    elif levels[0] > _MAX_FLOW_SIGMA or levels[-1] < 0:
        reason = f"{name} lists noise levels from {levels[0]:.6g} to {levels[-1]:.6g}, not within [0, 1]"
    steps = len(levels) - 1  # the end may be listed too
    return Levels(levels, timesteps[:steps] if len(timesteps) >= steps else (), reason)


def scheduler_incompatibility(scheduler: Any) -> str | None:
    """Say why a scheduler's steps are not those that a learned solver is made for; None where nothing is known."""
    if scheduler is None or not type(scheduler).__module__.startswith("diffusers."):
        return None
    name, config = type(scheduler).__name__, scheduler.config
    wanted = "FlowMatchEulerDiscreteScheduler"
    if wanted not in [base.__name__ for base in type(scheduler).__mro__]:
        shift = getattr(config, "flow_shift", None)
        made = f"{wanted}.from_config(pipe.scheduler.config)" if shift is None else f"{wanted}(shift={shift})"
        return f"a learned solver needs Euler's steps of a flow, {name} takes others: pipe.scheduler = {made}"
    if getattr(config, "stochastic_sampling", False):
        return (
            f"a learned solver needs steps without new noise: pipe.scheduler = {name}.from_config("
            "pipe.scheduler.config, stochastic_sampling=False)"
        )
    return None


def _levels(scheduler: Any, sigmas: tuple[float, ...], timesteps: tuple[float, ...]) -> tuple[float, ...]:
    """Return the levels that a scheduler's sigmas or, where it has none, its timesteps mean; see `read_levels`."""
    config = scheduler.config if hasattr(scheduler, "config") else None
    if not sigmas:
        return _levels_of_timesteps(config, timesteps)
    if max(sigmas) <= _MAX_FLOW_SIGMA:
        if getattr(config, "invert_sigmas", False):
            sigmas = tuple(1.0 - sigma for sigma in sigmas)
        # A solver that stops at its last sigma lists it twice, up to rounding.
        return (*sigmas[:-1], 0.0) if sigmas[-1] >= sigmas[-2] else sigmas
    count = getattr(config, "num_train_timesteps", 0)
    falls = all(later < earlier for earlier, later in itertools.pairwise(timesteps))
    if timesteps and falls and timesteps[-1] >= 0 and timesteps[0] < count:
        return _scaled(timesteps, count)
    return (*(sigma / (1.0 + sigma) for sigma in sigmas[:-1]), 0.0)


def _levels_of_timesteps(config: Any, timesteps: tuple[float, ...]) -> tuple[float, ...]:
    """Return the levels of a scheduler without sigmas."""
    count = getattr(config, "num_train_timesteps", None)
    if count is not None and all(t.is_integer() for t in timesteps):
        return _scaled(timesteps, count)
    # Integers without such a count are steps of a sampler of tokens.
    if all(t.is_integer() for t in timesteps) or max(timesteps) > _MAX_FLOW_SIGMA:
        raise ValueError("it has no sigmas, and its timesteps are neither within [0, 1] nor steps of a training")
    return timesteps if timesteps[-1] == 0 else (*timesteps, 0.0)


def _scaled(timesteps: tuple[float, ...], count: int) -> tuple[float, ...]:
    """Return timesteps as levels, counted from 1: the last may be 0, and its level must lie above the end."""
    return (*((t + 1) / count for t in timesteps), 0.0)


def _floats(*lists: Any) -> tuple[tuple[float, ...], ...]:
    """Return lists or tensors of numbers as Python floats; tensors on one device in one wait."""
    if all(isinstance(each, Tensor) for each in lists) and len({each.device for each in lists}) == 1:
        numbers = iter(torch.cat([each.flatten() for each in lists]).tolist())
        return tuple(tuple(map(float, itertools.islice(numbers, each.numel()))) for each in lists)
    return tuple(tuple(map(float, each.tolist() if hasattr(each, "tolist") else each)) for each in lists)

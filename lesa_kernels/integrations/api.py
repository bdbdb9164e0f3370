"""`lesa.enable`, `disable`, `enabled` and `summary` for diffusers' pipelines and transformers."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from lesa_kernels.integrations.adapters import find_adapter
from lesa_kernels.integrations.clock import Clock
from lesa_kernels.integrations.runs import Runs, Summary
from lesa_kernels.predictors import Forecaster, TaylorSeer
from lesa_kernels.schedule import Schedule, ScheduleRule

if TYPE_CHECKING:
    from lesa_kernels.integrations.hooks import ModelRootHook


def default_schedule(sigmas: Sequence[float]) -> Schedule:
    """The schedule of `enable` without one: a fifth of the steps, rounded up, at least three; uniform in sigma.

    Args:
        sigmas: S+1 falling noise levels.

    Returns:
        The schedule.

    Raises:
        ValueError: when the sigmas do not fall.
    """
    steps = len(sigmas) - 1
    return Schedule.uniform_in_sigma(sigmas, num_full=min(steps, max(3, -(-steps // 5))))


def enable(
    target: Any,
    predictor: Forecaster | None = None,
    schedule: Schedule | ScheduleRule | None = None,
    *,
    scheduler: Any = None,
    sigmas: Sequence[float] | None = None,
) -> None:
    """Skip the blocks of a diffusers transformer on most steps and forecast its feature instead.

    Where it is enabled already, this replaces predictor and schedule. Whatever is unexpected in a run (the latents
    change, a step is out of order, the schedule is for another number of steps, gradients are on) is answered by full
    steps for the rest of the run and one `LesaWarning`.

    Args:
        target: a pipeline, or a bare transformer: then `scheduler` or `sigmas` tells the steps.
        predictor: makes the forecasts; None takes `TaylorSeer(order=2, variable="sigma")`, which needs no training.
            Enable again after changing its weights.
        schedule: which steps are full, or a rule that makes it from the sigmas; None takes `default_schedule`.
        scheduler: of a bare transformer: the diffusers scheduler whose `step` the loop calls.
        sigmas: of a bare transformer: the S+1 noise levels. Its calls are counted for each cache context; a loop that
            may break off between two calls should say `cache_context(name, step_index=step)` or give a scheduler.

    Raises:
        ValueError: when there is no adapter for the model, nothing or too much tells the steps, or a cache of
            diffusers is on.
        TypeError: when target, predictor or schedule is something else.
    """
    # diffusers takes seconds to import, and only those who enable need it.
    from lesa_kernels.integrations.hooks import attach, detach

    model, root = _prepare(target, predictor, schedule, scheduler, sigmas)
    detach(model)
    attach(model, root)


def disable(target: Any) -> None:
    """Undo `enable` without a trace; nothing happens where it is not enabled.

    Args:
        target: a pipeline or a transformer.
    """
    from lesa_kernels.integrations.hooks import detach

    detach(bare_model(target))


@contextmanager
def enabled(
    target: Any,
    predictor: Forecaster | None = None,
    schedule: Schedule | ScheduleRule | None = None,
    *,
    scheduler: Any = None,
    sigmas: Sequence[float] | None = None,
) -> Generator[None, None, None]:
    """`enable` for the length of a with statement; afterwards all is as it was, an earlier `enable` included."""
    from lesa_kernels.integrations.hooks import attach, detach

    model, root = _prepare(target, predictor, schedule, scheduler, sigmas)
    before = detach(model)
    attach(model, root)
    try:
        yield
    finally:
        detach(model)
        if before is not None:
            attach(model, before)


def summary(target: Any) -> Summary:
    """Tell what became of the last run.

    Args:
        target: a pipeline or a transformer on which `enable` was called.

    Returns:
        The counts of full and forecast calls, and the plan.

    Raises:
        ValueError: when it is not enabled, or nothing ran yet.
    """
    from lesa_kernels.integrations.hooks import attached

    root = attached(bare_model(target))
    if root is None:
        raise ValueError("lesa.summary: target must be enabled, it is not")
    if root.runs.summary is None:
        raise ValueError("lesa.summary: target must have run since it was enabled, it has not")
    return root.runs.summary


def _is_pipeline(target: Any) -> bool:
    return hasattr(target, "transformer") and hasattr(target, "scheduler")


def bare_model(target: Any) -> nn.Module:
    """Return the transformer of a pipeline or the transformer itself, without the wrapper of torch.compile."""
    model = target.transformer if _is_pipeline(target) else target
    if not isinstance(model, nn.Module):
        raise TypeError(
            "lesa: target must be a pipeline with a transformer and a scheduler, or a transformer, "
            f"got {type(model).__name__}"
        )
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _prepare(
    target: Any,
    predictor: Forecaster | None,
    schedule: Schedule | ScheduleRule | None,
    scheduler: Any,
    sigmas: Sequence[float] | None,
) -> tuple[nn.Module, ModelRootHook]:
    """Check everything and make the hook, so that a refusal leaves the model as it was."""
    from lesa_kernels.integrations.hooks import ModelRootHook

    model = bare_model(target)
    chosen = TaylorSeer(order=2, variable="sigma") if predictor is None else predictor
    if not isinstance(chosen, Forecaster):
        raise TypeError(f"lesa.enable: predictor must be a Forecaster or None, got {type(chosen).__name__}")
    placement = default_schedule if schedule is None else schedule
    if not isinstance(placement, Schedule) and not callable(placement):
        raise TypeError(f"lesa.enable: schedule must be a Schedule, a rule or None, got {type(placement).__name__}")
    if getattr(model, "is_cache_enabled", False):
        raise ValueError("lesa.enable: the model must have no cache of diffusers enabled; call disable_cache() first")
    clock = Clock(target if _is_pipeline(target) else None, scheduler, sigmas)
    return model, ModelRootHook(model, find_adapter(model), Runs(clock, chosen, placement))

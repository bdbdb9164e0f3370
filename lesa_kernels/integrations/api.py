"""Turns forecasts on and off for diffusers' pipelines and transformers, sums up their runs, and records features."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lesa_kernels.integrations.models import (
    MODEL_OUTPUT,
    count_blocks,
    find_adapter,
    find_models,
    find_other_cache,
    is_pipeline,
)
from lesa_kernels.integrations.outputs import read_output
from lesa_kernels.integrations.state import CacheState, Options, Predictors, default_predictor
from lesa_kernels.integrations.stats import Summary, summarize
from lesa_kernels.predictors import Predictor, SolverPredictor
from lesa_kernels.predictors.base import OnOtherSigmas
from lesa_kernels.schedule import Schedule, ScheduleRule


def enable(
    target: Any,
    predictor: Predictors | None = None,
    schedule: Schedule | ScheduleRule | None = None,
    *,
    scheduler: Any = None,
    sigmas: Sequence[float] | None = None,
    capture: str | None = None,
    history_dtype: torch.dtype | None = None,
    on_other_sigmas: OnOtherSigmas = "refuse",
    chunk: int | None = None,
    check_every: int | None = None,
    max_error: float | None = None,
) -> None:
    """Skip the blocks of a diffusers transformer on most steps and forecast its feature instead.

    Where it is enabled already, this replaces predictor and schedule. A history serves the calls with the same
    conditions (cache context, shape of the latents, prompt, and whatever else the model gets); where they change, a
    full step begins a new one. What cannot be forecast at all (a schedule for another number of steps, gradients that
    are on, another cache) is answered by full steps for the rest of the run and one `LesaWarning`, and so are calls of
    another pipeline, loop or thread, which leave the run alone.

    Args:
        target: a pipeline, with all of its transformers, or a bare transformer, whose steps `scheduler` or `sigmas`
            gives.
        predictor: makes the forecasts; None takes `TaylorSeer(order=1, variable="sigma")`, which needs no training.
            Enable again after changing its weights. A mapping gives each cache context ("cond", "uncond", ...) its own;
            a context without one runs in full. With "cond" alone it serves a pipeline that opens no context too. Where
            one call holds both branches, as equal halves of its latents (SD3), "uncond" is for the first half.
        schedule: which steps are full, or a rule that makes it from the sigmas; None takes the one that the predictor
            was made for, or else `default_schedule`.
        scheduler: of a bare transformer: the diffusers scheduler whose `step` the loop calls.
        sigmas: of a bare transformer: the S+1 noise levels. Which of them a call is at follows from what the model is
            told: the level, 1 minus it, or 1,000 times it. A model that is told none is counted: a loop that may break
            off between two calls should say `cache_context(name, step_index=step)` or give a scheduler.
        capture: for a model without an adapter: the submodule whose first argument is the feature.
        history_dtype: dtype of the history, None for that of the features; torch.bfloat16 halves a float32 model's.
        on_other_sigmas: where a predictor knows the sigmas of its training and the run has others: "refuse" runs full
            steps, "adapt" uses the predictor as it is; both warn.
        chunk: at most this many forecasts are made at once. None makes those of a whole segment, in the fewest passes
            over memory; 1 holds the least memory.
        check_every: compare the features of each n-th full step after the first with what they would have been
            forecast; `summary` shows the errors. None compares none. Images stay the same; a check takes a pass over
            the history and keeps in memory what it reads.
        max_error: with check_every: full steps for the rest of a run from the first step on whose error, mean
            |forecast - feature| / mean |feature|, is larger. Each check then waits for the device.

    Raises:
        ValueError: when there is no adapter for the model, the steps come from none or several arguments, a cache of
            diffusers is on, or an option is out of range or does not go with another.
        TypeError: when target, predictor, schedule or an option is something else.
    """
    # diffusers takes seconds to import, and only those who enable need it.
    from lesa_kernels.integrations.forecast_hook import ForecastHook

    options = Options(history_dtype, on_other_sigmas, chunk, check_every, max_error)
    models = find_models(target)
    chosen = default_predictor() if predictor is None else predictor
    _check_predictor(chosen)
    if schedule is not None and not isinstance(schedule, Schedule) and not callable(schedule):
        raise TypeError(f"lesa.enable: schedule must be a Schedule, a rule or None, got {type(schedule).__name__}")
    for model, _ in models:
        if (reason := find_other_cache(model, target if is_pipeline(target) else None)) is not None:
            raise ValueError(f"lesa.enable: the model must have no other cache: {reason}")
    if isinstance(chosen, SolverPredictor):
        # It takes the place of the whole model, whatever this is made of.
        unused = {"capture": capture, "history_dtype": history_dtype, "check_every": check_every}
        for name, value in unused.items():
            if value is not None:
                raise ValueError(f"lesa.enable: {name} must be None for a learned solver, got {value!r}")
        capture = MODEL_OUTPUT
    hooks = []
    for model, wrappers in models:
        steps = {"pipeline": target if is_pipeline(target) else None, "scheduler": scheduler, "sigmas": sigmas}
        adapter = find_adapter(model, capture)
        state = CacheState(steps, chosen, schedule, options, count_blocks(model, adapter))
        hooks.append(ForecastHook(model, adapter, wrappers, state))
    for hook in hooks:
        hook.state.siblings = tuple(other.state for other in hooks if other is not hook)
    # Everything is checked by now: an error leaves the models as they were.
    disable(target)
    for (model, _), hook in zip(models, hooks, strict=True):
        hook.attach(model)


def disable(target: Any) -> None:
    """Undo `enable` without a trace; does nothing where it is not enabled.

    Args:
        target: a pipeline or a transformer.
    """
    from lesa_kernels.integrations.cache_hooks import find_hook

    for model, _ in find_models(target):
        if (hook := find_hook(model)) is not None:
            hook.detach(model)


@contextmanager
def enabled(
    target: Any,
    predictor: Predictors | None = None,
    schedule: Schedule | ScheduleRule | None = None,
    **options: Any,
) -> Generator[None, None, None]:
    """`enable` for the length of a with statement; afterwards all is as it was, an earlier `enable` included."""
    from lesa_kernels.integrations.cache_hooks import find_hook

    before = [(model, find_hook(model)) for model, _ in find_models(target)]
    enable(target, predictor, schedule, **options)
    try:
        yield
    finally:
        for model, earlier in before:
            disable(model)
            if earlier is not None:
                earlier.attach(model)


def summary(target: Any) -> Summary:
    """Sum up the last run; waits for the device to finish the calls that were timed.

    Args:
        target: a pipeline or a transformer on which `enable` was called.

    Returns:
        Calls, times, memory and the plan; of a pipeline with two transformers, both put together.

    Raises:
        ValueError: when it is not enabled, or nothing ran yet.
    """
    from lesa_kernels.integrations.cache_hooks import find_hook
    from lesa_kernels.integrations.forecast_hook import ForecastHook

    hooks = [hook for model, _ in find_models(target) if isinstance(hook := find_hook(model), ForecastHook)]
    if not hooks:
        raise ValueError("lesa.summary: target must be enabled, it is not")
    runs = [hook.state.stats for hook in hooks if hook.state.stats is not None]
    if not runs:
        others = next(
            (f", its calls ran in full: {hook.state.left_alone}" for hook in hooks if hook.state.left_alone), ""
        )
        raise ValueError(f"lesa.summary: target must have run since it was enabled, it has not{others}")
    return summarize(runs)


@contextmanager
def recorded(target: Any, capture: str | None = None) -> Generator[list[Tensor], None, None]:
    """Record features for the length of a with statement, of full and of forecast steps alike.

    Args:
        target: a pipeline or a transformer, with `lesa.enable` or without.
        capture: the submodule whose first argument is the feature, where it is not to be the adapter's.

    Yields:
        A list that receives a detached copy [*feature] at each call of a model, at the adapter's capture point.

    Raises:
        ValueError: when there is no adapter for the model.
        TypeError: when target is something else.
    """
    features: list[Tensor] = []
    models = find_models(target)
    with ExitStack() as stack:
        if any(wrappers or getattr(model, "_compiled_call_impl", None) is not None for model, wrappers in models):
            # Graphs that were compiled before do not see hooks that are added now.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for model, _ in models:
            for handle in _record(model, find_adapter(model, capture).capture, features):
                stack.callback(handle.remove)
        yield features


def _record(model: nn.Module, capture: str, features: list[Tensor]) -> list[RemovableHandle]:
    """Append the feature of each call of a model to a list, until the handles are removed."""
    latest: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The first full step of an adapter that is made from the model's structure comes by twice.
        latest[:] = [args[0] if args else next(iter(kwargs.values()))]

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        feature = read_output(output) if capture == MODEL_OUTPUT else latest.pop() if latest else None
        if feature is not None:
            features.append(feature.detach().clone())

    handles = [model.register_forward_hook(keep)]
    if capture != MODEL_OUTPUT:
        handles.append(model.get_submodule(capture).register_forward_pre_hook(take, with_kwargs=True))
    return handles


def _check_predictor(predictor: object) -> None:
    """Check that an argument is a predictor or a mapping of them."""
    if isinstance(predictor, Predictor):
        return
    if not isinstance(predictor, Mapping):
        raise TypeError(
            f"lesa.enable: predictor must be a Predictor, a mapping of them or None, got {type(predictor).__name__}"
        )
    if not predictor:
        raise ValueError("lesa.enable: a mapping of predictors must have at least one entry, got none")
    for name, each in predictor.items():
        if isinstance(each, SolverPredictor):
            raise TypeError(
                f"lesa.enable: a learned solver serves all cache contexts at once, got a mapping with one for {name!r}"
            )
        if not isinstance(name, str) or not isinstance(each, Predictor):
            raise TypeError(
                "lesa.enable: a mapping of predictors must go from names of cache contexts to Predictors, "
                f"got {name!r}: {type(each).__name__}"
            )

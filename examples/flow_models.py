"""Loads the examples' trained models, and integrates their flows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from lesa_kernels.files import opened_tensors, read_json
from lesa_kernels.predictors.saved import assembled


def load_trained(
    builds: Iterable[Callable[[], ModelMixin]], folder: str | Path, device: str | torch.device, dtype: torch.dtype
) -> ModelMixin:
    """Load a trained model, ready to sample.

    Args:
        builds: make the models that it may be one of.
        folder: what `save` in `examples.flow_training` wrote.
        device: where the model goes.
        dtype: floating point type of the parameters; the files hold float16.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: `folder` holds no model.
        ValueError: a file is damaged, or not of a model that one of `builds` makes.
    """
    file, weights = Path(folder) / "config.json", Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if not (file.exists() and weights.exists()):
        raise FileNotFoundError(
            f"load_model: folder must hold a trained model (config.json, {weights.name}), got {folder}"
        )
    build = _described(file, builds)
    with opened_tensors(weights) as tensors:
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no mapping
        try:
            # diffusers' own loader would fall back to a pickle, and drop what it has no place for.
            model = assembled(build, shapes, tensors.get_tensor)
        except ValueError as error:
            raise ValueError(f"{weights}: not the weights of such a model: {error}") from error
    # diffusers' own `to` warns of modules that must stay in float32, of which there are none.
    return nn.Module.to(model, device, dtype).eval()


def _described(file: Path, builds: Iterable[Callable[[], ModelMixin]]) -> Callable[[], ModelMixin]:
    """Return what makes the model that a config describes."""
    config = {name: value for name, value in read_json(file).items() if not name.startswith("_")}
    for build in builds:
        with torch.device("meta"):
            own = {name: _as_in_json(value) for name, value in build().config.items()}
        if config and config.items() <= own.items():
            return build
    raise ValueError(f"{file}: must be the config of a model that build_model makes")


def _as_in_json(value: Any) -> Any:
    """Return an entry of a config as it is read from a file: JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value


@torch.no_grad()
def integrate(
    velocity: Callable[[Tensor, float], Tensor], noise: Tensor, sigmas: Sequence[float], order: Literal[1, 2]
) -> Tensor:
    """Integrate dx/dsigma = velocity(x, sigma) over given noise levels, one call of the model a step.

    Order 2 is Adams-Bashforth for unequal steps: x += h * ((1 + r/2) v - (r/2) v_previous), r the ratio of this step to
    the one before; its first step is Euler's.

    Args:
        velocity: (x, sigma) -> a tensor like x.
        noise: x at sigmas[0].
        sigmas: falling noise levels; the last one is where the samples end, 0.
        order: 1 is Euler, 2 Adams-Bashforth.

    Returns:
        x at sigmas[-1].
    """
    x, previous, before = noise, None, 0.0
    for now, after in itertools.pairwise(sigmas):
        current = velocity(x, now)
        step = after - now
        slope = current
        if order == 2 and previous is not None:
            half_ratio = 0.5 * step / before
            slope = (1 + half_ratio) * current - half_ratio * previous
        x = x + step * slope
        previous, before = current, step
    return x

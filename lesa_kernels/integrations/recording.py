"""Records the captured feature of every call of a model: what training learns from and errors are measured on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lesa_kernels.integrations.api import bare_models, given_models, is_compiled
from lesa_kernels.integrations.models import MODEL_OUTPUT, find_adapter
from lesa_kernels.integrations.outputs import read_output


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

    def record(model: nn.Module, point: str) -> Generator[RemovableHandle, None, None]:
        latest: list[Tensor] = []

        def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # The first full step of an adapter that is made from the model's structure comes by twice.
            latest[:] = [args[0] if args else next(iter(kwargs.values()))]

        def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            feature = read_output(output) if point == MODEL_OUTPUT else latest.pop() if latest else None
            if feature is not None:
                features.append(feature.detach().clone())

        if point != MODEL_OUTPUT:
            yield model.get_submodule(point).register_forward_pre_hook(take, with_kwargs=True)
        yield model.register_forward_hook(keep)

    with ExitStack() as handles:
        if any(is_compiled(model) for model in given_models(target)):
            # Graphs that were compiled before do not see hooks that are added now.
            handles.enter_context(torch.compiler.set_stance("force_eager"))
        for model in bare_models(target):
            for handle in record(model, find_adapter(model, capture).capture):
                handles.callback(handle.remove)
        yield features

"""Records the captured feature of every call of a model: what training learns from and errors are measured on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lesa_kernels.integrations.adapters import find_adapter
from lesa_kernels.integrations.api import bare_model


@contextmanager
def recorded(target: Any) -> Generator[list[Tensor], None, None]:
    """Record features for the length of a with statement, of full and of forecast steps alike.

    Args:
        target: a pipeline or a transformer, with `lesa.enable` or without.

    Yields:
        A list that receives a detached copy [*feature] at each call of the model, at the adapter's capture point.

    Raises:
        ValueError: when there is no adapter for the model.
        TypeError: when target is something else.
    """
    # Importing the hooks registers the adapters that ship with the package.
    from lesa_kernels.integrations import hooks  # noqa: F401

    model = bare_model(target)
    features: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        feature: Tensor = args[0] if args else next(iter(kwargs.values()))
        features.append(feature.detach().clone())

    handle = model.get_submodule(find_adapter(model).capture).register_forward_pre_hook(take, with_kwargs=True)
    try:
        yield features
    finally:
        handle.remove()

"""Records the captured feature of every call of a model: what training learns from and errors are measured on."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from lesa_kernels.integrations.adapters import MODEL_OUTPUT, find_adapter
from lesa_kernels.integrations.api import bare_models


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
    # Importing the hooks registers the adapters that ship with the package.
    from lesa_kernels.integrations import hooks  # noqa: F401
    from lesa_kernels.integrations.whole import read_output

    features: list[Tensor] = []

    def keep(feature: Tensor | None) -> None:
        if feature is not None:
            features.append(feature.detach().clone())

    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args[0] if args else next(iter(kwargs.values())))

    def take_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(read_output(output))

    with ExitStack() as handles:
        for model in bare_models(target):
            point = find_adapter(model, capture).capture
            if point == MODEL_OUTPUT:
                handle = model.register_forward_hook(take_output)
            else:
                handle = model.get_submodule(point).register_forward_pre_hook(take, with_kwargs=True)
            handles.callback(handle.remove)
        yield features

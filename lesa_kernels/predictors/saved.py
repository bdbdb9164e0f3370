"""Predictors in folders and on the hub: `config.json` says of which kind one is, safetensors holds its numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from huggingface_hub import hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError

if TYPE_CHECKING:
    from lesa_kernels.predictors.lesa import LesaPredictor
    from lesa_kernels.predictors.linear import LinearPredictor

_Predictor = TypeVar("_Predictor")


def strict_from_pretrained(
    cls: type[_Predictor],
    load: Callable[..., Any],
    model_id: str,
    required: Sequence[str],
    options: dict[str, Any],
) -> _Predictor:
    """Load for `from_pretrained`; the mixin's own default would fill what is missing with random numbers.

    Args:
        cls: the predictor's class.
        load: the mixin's loader.
        model_id: folder or hub id.
        required: what config.json must name.
        options: what it names.

    Returns:
        The predictor.

    Raises:
        FileNotFoundError: when the folder lacks its weights.
        ValueError: when the config lacks an entry, or the weights are not those of such a predictor.
    """
    if missing := [name for name in required if name not in options]:
        raise ValueError(f"{model_id}: config.json must be there and name {', '.join(missing)}")
    if Path(model_id).is_dir() and not Path(model_id, SAFETENSORS_SINGLE_FILE).is_file():
        raise FileNotFoundError(f"{model_id}: must hold {SAFETENSORS_SINGLE_FILE}")
    try:
        loaded: _Predictor = load(model_id=model_id, strict=True, **options)
        return loaded
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{model_id}: not the weights of such a {cls.__name__}: {error}") from error


def load_predictor(folder_or_hub_id: str | Path, **options: Any) -> LesaPredictor | LinearPredictor:
    """Load a predictor of whatever kind, as its `save_pretrained` wrote it.

    Args:
        folder_or_hub_id: where it lies.
        options: as of huggingface_hub's `from_pretrained` (revision, token, cache_dir, ...).

    Returns:
        The predictor.

    Raises:
        ValueError: when config.json names no kind of predictor that is known here, or the weights do not fit it.
        FileNotFoundError: when the folder lacks a file.
    """
    from lesa_kernels.predictors.lesa import LesaPredictor
    from lesa_kernels.predictors.linear import LinearPredictor

    kinds = {kind.__name__: kind for kind in (LesaPredictor, LinearPredictor)}
    folder = Path(folder_or_hub_id)
    if folder.is_dir():
        file = folder / CONFIG_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: must hold {CONFIG_NAME}")
    else:
        file = Path(hf_hub_download(str(folder_or_hub_id), CONFIG_NAME, **options))
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: must be a JSON object: {error}") from error
    # Predictors that were saved before there were several kinds are LESA's.
    name = config.get("predictor", LesaPredictor.__name__) if isinstance(config, dict) else None
    if name not in kinds:
        raise ValueError(f"{file}: predictor must be one of {', '.join(kinds)}, got {name!r}")
    loaded: LesaPredictor | LinearPredictor = kinds[name].from_pretrained(str(folder_or_hub_id), **options)
    return loaded

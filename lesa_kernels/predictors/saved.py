"""Saves and loads predictors: `config.json` holds kind and options, `model.safetensors` the numbers."""

from __future__ import annotations

import hashlib
import inspect
import json
import reprlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors.torch import save_model
from torch import Tensor, nn

from lesa_kernels.files import opened_tensors, parsed, read_json, replacing_all, shortened

if TYPE_CHECKING:
    from lesa_kernels.predictors.lesa import LesaPredictor
    from lesa_kernels.predictors.linear import LinearPredictor
    from lesa_kernels.predictors.solver import SolverPredictor

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_KIND = "predictor"
# Predictors that were saved before there were several kinds are LESA's.
_FIRST_KIND = "LesaPredictor"
# Entry of the weights' header: the SHA-256 of the config that they were saved with.
_DIGEST = "config_sha256"
_README = "README.md"

_Module = TypeVar("_Module", bound=nn.Module)
_Predictor = TypeVar("_Predictor", bound="Saved")


class Saved(nn.Module, PyTorchModelHubMixin):
    """Base of predictors that are kept in folders and on the hub.

    The weights hold a digest of their config: a save that was cut short between the two files is refused when it is
    loaded, never taken for a predictor.
    """

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Write `config.json`, `model.safetensors` and, where there is none, `README.md`; each whole or not at all.

        Args:
            save_directory: made if missing.
            options: `push_to_hub=True` puts it on the hub too, with the further options of `push_to_hub`.

        Returns:
            What `push_to_hub` returned, if it was asked for.

        Raises:
            OSError: when a file cannot be written; names it.
        """
        push, repo_id = options.pop("push_to_hub", False), options.pop("repo_id", None)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing_all(folder, SAFETENSORS_SINGLE_FILE) as unfinished:
            super().save_pretrained(unfinished, model_card_kwargs=options.get("model_card_kwargs"))
            if (folder / _README).exists():
                (unfinished / _README).unlink()
        return str(self.push_to_hub(repo_id or folder.name, **options)) if push else None

    def _save_pretrained(self, save_directory: Path) -> None:
        metadata = {_DIGEST: _digest(self._hub_mixin_config)}
        save_model(self, str(save_directory / SAFETENSORS_SINGLE_FILE), metadata)

    @classmethod
    def from_pretrained(
        cls: type[_Predictor],
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        **options: Any,
    ) -> _Predictor:
        """Load what `save_pretrained` wrote. Nothing in the files is run, and no size in them is believed unchecked.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            map_location: where the predictor goes.
            options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` for the hub; arguments of
                the constructor, in place of those of the config.

        Returns:
            The predictor, in evaluation mode.

        Raises:
            FileNotFoundError: when a file is missing.
            ValueError: when a file is damaged, the config lacks an entry or has one that is not known here, or the
                weights are not those of such a predictor.
        """
        where = str(pretrained_model_name_or_path)
        hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        config, weights = _found(where, hub)
        digest = _digest(config)
        kind = config.pop(_KIND, _FIRST_KIND)
        if kind not in [base.__name__ for base in cls.__mro__]:
            raise ValueError(f"{where}: must hold a {cls.__name__}, its config says {reprlib.repr(kind)}")
        known = inspect.signature(cls).parameters
        if strange := sorted(config.keys() - known.keys()):
            raise ValueError(
                f"{where}: its config has entries that are not known here, a newer version may have written them: "
                f"{reprlib.repr(strange)}"
            )
        config |= options
        required = [name for name, parameter in known.items() if parameter.default is parameter.empty]
        if missing := [name for name in required if name not in config]:
            raise ValueError(f"{where}: {CONFIG_NAME} must name {', '.join(missing)}")
        if not weights.exists():
            raise FileNotFoundError(f"{where}: must hold {SAFETENSORS_SINGLE_FILE}")
        with opened_tensors(weights) as tensors:
            metadata = tensors.metadata() or {}
            # Earlier versions kept the config itself in the header.
            earlier = _digest(parsed(metadata["config"], weights)) if "config" in metadata else digest
            if metadata.get(_DIGEST, earlier) != digest:
                raise ValueError(
                    f"{where}: {CONFIG_NAME} must be the config of the weights beside it, they were saved with another "
                    "(a save was cut short, or the file was edited): save the predictor again"
                )
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no mapping
            try:
                predictor = assembled(lambda: cls(**config), shapes, tensors.get_tensor)
            except (TypeError, ValueError, RuntimeError, OverflowError) as error:
                raise ValueError(f"{where}: config and weights make no {cls.__name__}: {shortened(error)}") from error
        return predictor.to(map_location).eval()


def assembled(
    make: Callable[[], _Module], shapes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]
) -> _Module:
    """Make a module around a state; takes no memory before the state is known to be one of such a module.

    Args:
        make: makes the module.
        shapes: of the tensors that there are.
        read: returns one of them.

    Returns:
        The module, its tensors copied and of its own dtypes.

    Raises:
        ValueError: when a name or a shape is not that of the module, or a tensor has no floating point type.
    """
    with torch.device("meta"):
        module = make()
    wanted = module.state_dict()
    if strange := [name for name in shapes if name not in wanted]:
        raise ValueError(f"has no place for {reprlib.repr(strange[0])}")
    for name, like in wanted.items():
        if name not in shapes:
            raise ValueError(f"lacks {name}")
        if tuple(shapes[name]) != like.shape:
            raise ValueError(f"{name} must have shape {tuple(like.shape)}, got {tuple(shapes[name])}")
    state = {}
    for name, like in wanted.items():
        tensor = read(name)
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating point type, got {tensor.dtype}")
        state[name] = tensor.to(like.dtype, copy=True)
    module.load_state_dict(state, strict=True, assign=True)
    return module


def load_predictor(folder_or_hub_id: str | Path, **options: Any) -> LesaPredictor | LinearPredictor | SolverPredictor:
    """Load a predictor of any kind, as its `save_pretrained` wrote it.

    Args:
        folder_or_hub_id: where it lies.
        options: as of `from_pretrained` (revision, token, cache_dir, ...).

    Returns:
        The predictor.

    Raises:
        ValueError: when the config names no kind of predictor that is known here, or the weights do not fit it.
        FileNotFoundError: when the folder lacks a file.
    """
    from lesa_kernels.predictors.lesa import LesaPredictor
    from lesa_kernels.predictors.linear import LinearPredictor
    from lesa_kernels.predictors.solver import SolverPredictor

    kinds: dict[str, type[LesaPredictor | LinearPredictor | SolverPredictor]] = {
        kind.__name__: kind for kind in (LesaPredictor, LinearPredictor, SolverPredictor)
    }
    where = str(folder_or_hub_id)
    config, _ = _found(where, {name: options[name] for name in _HUB_OPTIONS if name in options})
    name = config.get(_KIND, _FIRST_KIND)
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"{where}: predictor must be one of {', '.join(kinds)}, got {reprlib.repr(name)}")
    return kinds[name].from_pretrained(where, **options)


def _found(where: str, hub: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """Return the config of a folder or of a hub id, and the file of its weights."""
    folder = Path(where)
    if folder.is_dir():
        file, weights = folder / CONFIG_NAME, folder / SAFETENSORS_SINGLE_FILE
    elif folder.is_absolute() or folder.exists():
        raise FileNotFoundError(f"{where}: must be a folder that holds {CONFIG_NAME}, or the name of one on the hub")
    else:
        file, weights = (Path(hf_hub_download(where, name, **hub)) for name in (CONFIG_NAME, SAFETENSORS_SINGLE_FILE))
    if not file.exists():
        branches = ", ".join(sorted(each.parent.name for each in file.parent.glob(f"*/{CONFIG_NAME}")))
        what = f", it holds the branches {branches}: load each from its own folder" if branches else ""
        raise FileNotFoundError(f"{where}: must hold {CONFIG_NAME}{what}")
    return read_json(file), weights


def _digest(config: object) -> str:
    """Return the SHA-256 of a config."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()

"""Saves and loads predictors: `config.json` holds kind and options, `model.safetensors` the numbers."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import reprlib
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors.torch import save_model
from torch import Tensor, nn

from lesa_kernels.files import (
    LARGEST_JSON,
    LARGEST_WEIGHTS,
    PATIENCE_SECONDS,
    PAUSE_SECONDS,
    opened,
    parsed,
    replacing_all,
    shortened,
    tensors_of,
    writer_of,
)

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
            BlockingIOError: when another process that saves there does not come to its end; names it.
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
            BlockingIOError: when another process that saves there does not come to its end; names it.
        """
        where = str(pretrained_model_name_or_path)
        hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
        with _opened(where, hub) as (config, tensors):
            return cls._made(where, config, tensors, options).to(map_location)

    @classmethod
    def _made(
        cls: type[_Predictor], where: str, config: dict[str, Any], tensors: Any, options: Mapping[str, Any]
    ) -> _Predictor:
        """Make the predictor of a config and of open weights."""
        kind = config.pop(_KIND, _FIRST_KIND)
        if kind not in [base.__name__ for base in cls.__mro__]:
            raise ValueError(f"{where}: must hold a {cls.__name__}, its config says {reprlib.repr(kind)}")
        known = inspect.signature(cls).parameters
        if strange := sorted(config.keys() - known.keys()):
            raise ValueError(
                f"{where}: its config has entries that are not known here, a newer version may have written them: "
                f"{reprlib.repr(strange)}"
            )
        config = {**config, **options}
        required = [name for name, parameter in known.items() if parameter.default is parameter.empty]
        if missing := [name for name in required if name not in config]:
            raise ValueError(f"{where}: {CONFIG_NAME} must name {', '.join(missing)}")
        if tensors is None:
            raise FileNotFoundError(f"{where}: must hold {SAFETENSORS_SINGLE_FILE}")
        shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - no mapping
        try:
            return assembled(lambda: cls(**config), shapes, tensors.get_tensor).eval()
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{where}: config and weights make no {cls.__name__}: {shortened(error)}") from error


@torch.inference_mode(False)
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
        BlockingIOError: when another process that saves there does not come to its end; names it.
    """
    from lesa_kernels.predictors.lesa import LesaPredictor
    from lesa_kernels.predictors.linear import LinearPredictor
    from lesa_kernels.predictors.solver import SolverPredictor

    kinds: dict[str, type[LesaPredictor | LinearPredictor | SolverPredictor]] = {
        kind.__name__: kind for kind in (LesaPredictor, LinearPredictor, SolverPredictor)
    }
    where = str(folder_or_hub_id)
    map_location = options.pop("map_location", "cpu")
    hub = {name: options.pop(name) for name in _HUB_OPTIONS if name in options}
    with _opened(where, hub) as (config, tensors):
        name = config.get(_KIND, _FIRST_KIND)
        if not isinstance(name, str) or name not in kinds:
            raise ValueError(f"{where}: predictor must be one of {', '.join(kinds)}, got {reprlib.repr(name)}")
        return kinds[name]._made(where, config, tensors, options).to(map_location)


@contextmanager
def _opened(where: str, hub: Mapping[str, Any]) -> Generator[tuple[dict[str, Any], Any], None, None]:
    """Open config and weights of one save; where another process is between the two, wait for it.

    Each file is opened once, and closed after the with statement. Where there are no weights, None stands for them.
    """
    file, weights = _found(where, hub)
    latest = time.monotonic() + PATIENCE_SECONDS
    before: list[tuple[int, ...]] = []
    who: str | None = None
    while True:
        with ExitStack() as stack:
            handles = [stack.enter_context(opened(file))]
            config = parsed(handles[0].read(LARGEST_JSON + 1), file)
            if weights.exists():
                handles.append(stack.enter_context(opened(weights, LARGEST_WEIGHTS)))
                tensors = stack.enter_context(tensors_of(handles[1], weights))
                if _belong_together(config, tensors, weights):
                    yield config, tensors
                    return
            now = [_identity(handle) for handle in handles]
        # That nobody was writing between two looks at the same files means that they stay as they are.
        if now == before and who is None:
            break
        before, who = now, writer_of(file.parent, SAFETENSORS_SINGLE_FILE)
        if time.monotonic() > latest:
            text = f"{who or 'another process'} is saving a predictor there; load it when it has done so"
            raise BlockingIOError(errno.EAGAIN, text, where)
        time.sleep(PAUSE_SECONDS)
    if len(now) == 1:
        yield config, None
        return
    raise ValueError(
        f"{where}: {CONFIG_NAME} must be the config of the weights beside it, they were saved with another "
        "(a save was cut short, or the file was edited): save the predictor again"
    )


def _belong_together(config: dict[str, Any], tensors: Any, weights: Path) -> bool:
    """Whether weights were saved with a config, as far as they say."""
    metadata = tensors.metadata() or {}
    digest = _digest(config)
    # Earlier versions kept the config itself in the header.
    earlier = _digest(parsed(metadata["config"], weights)) if "config" in metadata else digest
    return bool(metadata.get(_DIGEST, earlier) == digest)


def _identity(handle: BinaryIO) -> tuple[int, ...]:
    """Return what tells a file from another one that took its place."""
    found = os.fstat(handle.fileno())
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _found(where: str, hub: Mapping[str, Any]) -> tuple[Path, Path]:
    """Return the files of the config and of the weights in a folder or of a hub id."""
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
    return file, weights


def _digest(config: object) -> str:
    """Return the SHA-256 of a config."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()

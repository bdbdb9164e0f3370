"""Reads checkpoints written by the published training script, without running any code from them."""

from __future__ import annotations

import collections
import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.predictors.lesa import LesaPredictor

_PREFIX = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+")
_KEY = re.compile(r"^(latent|timestep)(?:_(cond|uncond))?\.(\d+)\.(.+)$")
_PUBLISHED_THRESHOLDS = {False: (0.9, 0.5, 0.0), True: (0.9, 0.4, 0.0)}
_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
}


class _Placeholder:
    """Stands for an object of a class that is not known here; takes any arguments and state and does nothing."""

    def __new__(cls, *args: object, **kwargs: object) -> _Placeholder:
        return super().__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Take an item of a pickled list subclass."""


def _rebuild_tensor(storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> object:
    """Make a tensor over a storage that the file holds; anything else, such as an integer tensor, is a placeholder."""
    if not isinstance(storage, Tensor):
        return _Placeholder()
    count = 1
    for extent in size:
        count *= extent
    # Strides can make a tensor of any size from one element: the archive must hold every element.
    if count > storage.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} has more elements than its storage, {storage.numel()}")
    return storage.as_strided(size, stride, offset).clone()


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


# What a state of plain tensors is made of; every other name in the file becomes an inert placeholder.
_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
}


class _Unpickler(pickle.Unpickler):
    """Builds containers, and tensors from the records of the archive; calls nothing else."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}data.pkl")))
        self._archive = archive
        self._root = root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        return _KNOWN.get((module, name), _Placeholder)

    def persistent_load(self, pid: Any) -> object:
        """Return the storage that a tensor refers to, as a flat tensor."""
        _, dtype, key, *_ = pid
        if not isinstance(dtype, torch.dtype):
            return _Placeholder()
        if key not in self._storages:
            # Reading a record whole checks its CRC.
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]


def load_official(path: str | Path, *, thresholds: tuple[float, ...] | None = None) -> dict[str, LesaPredictor]:
    """Read a checkpoint of the published training script; sizes are inferred from its tensors.

    The file is a zip archive around a pickle `{config, model, optimizer, scheduler}`, of which only `model` is used.
    Nothing in it is executed: the pickle is read by an unpickler that knows containers and tensors and puts a
    placeholder for everything else. Keys may carry the prefixes `module.`, `model.` and `_orig_mod.`.

    Args:
        path: the file.
        thresholds: of the stages, falling; by default the published ones: 0.9, 0.5, 0 without branches (FLUX,
            HunyuanVideo) and 0.9, 0.4, 0 with the branches of Qwen-Image.

    Returns:
        {"cond": predictor}, or {"cond": ..., "uncond": ...} where the file has two branches; float32, on the CPU.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged, no checkpoint of torch, or not a LESA predictor.
    """
    file = Path(path)
    branches: dict[str, dict[str, Tensor]] = {}
    suffixed = False
    for key, tensor in _read_state(file).items():
        match = _KEY.match(_PREFIX.sub("", key))
        if match is None:
            raise ValueError(f"{file}: not a LESA predictor: key {key!r} is neither latent.* nor timestep.*")
        kind, branch, stage, rest = match.groups()
        suffixed = suffixed or branch is not None
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {key} must be finite")
        state = branches.setdefault(branch or "cond", {})
        name = f"{kind}.{int(stage)}.{rest}"
        if name in state:
            raise ValueError(f"{file}: has two tensors for {name}, the second is {key!r}")
        state[name] = tensor.float()
    if "cond" not in branches:
        raise ValueError(f"{file}: not a LESA predictor: its model has no tensors of a conditional branch")
    chosen = _PUBLISHED_THRESHOLDS[suffixed] if thresholds is None else thresholds
    return {branch: _build(file, state, chosen) for branch, state in sorted(branches.items())}


def _read_state(file: Path) -> dict[str, Tensor]:
    """Return the tensors of `model`."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file}: not a checkpoint written by torch.save (no zip archive), or truncated")
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"must hold one data.pkl, got {len(pickles)}")
            content = _Unpickler(archive, pickles[0].removesuffix("data.pkl")).load()
    except Exception as error:
        # Whatever a damaged or hostile stream provokes in the parser means the same to the user.
        raise ValueError(f"{file}: not a readable checkpoint ({type(error).__name__}: {error})") from error
    model = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ValueError(f"{file}: must hold a dict with the key 'model', got {type(content).__name__}")
    for key, value in model.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file}: model must map names to tensors, got {key!r}: {type(value).__name__}")
    return model


def _build(file: Path, state: dict[str, Tensor], thresholds: tuple[float, ...]) -> LesaPredictor:
    """Make a predictor of the sizes that the state's shapes tell, and load the state strictly."""
    stages = 1 + max(int(key.split(".")[1]) for key in state)
    if stages != len(thresholds):
        raise ValueError(f"{file}: has {stages} stages, thresholds must name as many, got {thresholds}")
    try:
        windows = [state[f"latent.{stage}.weight"].shape[1] for stage in range(stages)]
        hidden, inputs, bases = state["timestep.0.layers.0.spline_weight"].shape
        knots = state["timestep.0.layers.0.grid"].shape[1]
        order = knots - bases - 1
        predictor = LesaPredictor(
            num_steps=inputs - 1,
            stages=tuple(zip(thresholds, windows, strict=True)),
            hidden_dim=hidden,
            grid_size=bases - order,
            spline_order=order,
        )
        predictor.load_state_dict(state, strict=True)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: not a LESA predictor of the published form: {error}") from error
    return predictor

"""Reads checkpoints written by the published training script, without running any code from them."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.files import regular, shortened
from lesa_kernels.predictors.lesa import LesaPredictor
from lesa_kernels.predictors.pickled import Name, Rebuild, Unknown, read_pickle
from lesa_kernels.predictors.saved import assembled

_PREFIX = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+")
_KEY = re.compile(r"^(latent|timestep)(?:_(cond|uncond))?\.([0-9]{1,3})\.(.+)$")
_PUBLISHED_THRESHOLDS = {False: (0.9, 0.5, 0.0), True: (0.9, 0.4, 0.0)}
_STORAGE_DTYPES = {
    Name("torch", "FloatStorage"): torch.float32,
    Name("torch", "HalfStorage"): torch.float16,
    Name("torch", "BFloat16Storage"): torch.bfloat16,
    Name("torch", "DoubleStorage"): torch.float64,
}
# Of the part that describes the tensors, a few hundred bytes each.
_LARGEST_PICKLE = 1 << 20
_MOST_DIMENSIONS = 8


def _empty_dict(arguments: tuple[Any, ...]) -> object:
    if arguments:
        raise ValueError("a dict must be filled item by item")
    return {}


def _tensor(arguments: tuple[Any, ...]) -> object:
    """Make a view of a storage that the file holds; of any other, such as one of integers, an `Unknown`."""
    storage, offset, size, stride, *_ = arguments
    if not isinstance(storage, Tensor):
        return Unknown()
    if len(size) > _MOST_DIMENSIONS or not all(isinstance(extent, int) for extent in size):
        raise ValueError(f"a tensor must have a shape of at most {_MOST_DIMENSIONS} integers")
    count = 1
    for extent in size:
        count *= extent
    # Strides can make a tensor of any size from one element: the archive must hold every element.
    if count > storage.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} has more elements than its storage, {storage.numel()}")
    return storage.as_strided(size, stride, offset)


_REBUILD: dict[Name, Rebuild] = {
    Name("collections", "OrderedDict"): _empty_dict,
    Name("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Name("torch._utils", "_rebuild_parameter"): lambda arguments: arguments[0],
}


class _Storages:
    """The records of an archive that tensors lie in.

    Args:
        archive: the file.
        root: folder of the records in it.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        self._archive = archive
        self._root = root
        self._read: dict[str, Tensor] = {}

    def __call__(self, persistent_id: tuple[Any, ...]) -> object:
        """Return the storage that a tensor refers to, as a flat tensor."""
        _, kind, key, *_ = persistent_id
        dtype = _STORAGE_DTYPES.get(kind) if isinstance(kind, Name) else None
        if dtype is None:
            return Unknown()
        if not isinstance(key, str):
            raise ValueError("a storage's key must be a text")
        if key not in self._read:
            # Reading a record whole checks its CRC.
            data = bytearray(self._archive.read(f"{self._root}data/{key}"))
            self._read[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._read[key]


def load_official(path: str | Path, *, thresholds: tuple[float, ...] | None = None) -> dict[str, LesaPredictor]:
    """Read a checkpoint of the published training script; sizes are inferred from its tensors.

    The file is a zip archive around a pickle `{config, model, optimizer, scheduler}`, of which only `model` is used.
    Nothing in it is executed: the pickle is read by a machine that has containers and tensors and puts a placeholder
    for everything else, see `lesa_kernels.predictors.pickled`. Memory is taken for a few times the size of
    the file at most. Keys may carry the prefixes `module.`, `model.` and `_orig_mod.`.

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
            name = shortened(repr(key))
            raise ValueError(f"{file}: not a LESA predictor: key {name} is neither latent.* nor timestep.*")
        kind, branch, stage, rest = match.groups()
        suffixed = suffixed or branch is not None
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {shortened(key)} must be finite")
        state = branches.setdefault(branch or "cond", {})
        name = f"{kind}.{int(stage)}.{rest}"
        if name in state:
            raise ValueError(f"{file}: has two tensors for {shortened(name)}")
        state[name] = tensor.float()
    if "cond" not in branches:
        raise ValueError(f"{file}: not a LESA predictor: its model has no tensors of a conditional branch")
    chosen = _PUBLISHED_THRESHOLDS[suffixed] if thresholds is None else thresholds
    return {branch: _build(file, state, chosen) for branch, state in sorted(branches.items())}


def _read_state(file: Path) -> dict[str, Tensor]:
    """Return the tensors of `model`."""
    size = regular(file).stat().st_size
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file}: not a checkpoint written by torch.save (no zip archive), or truncated")
    try:
        with zipfile.ZipFile(file) as archive:
            content = _read_archive(archive, size)
    except Exception as error:
        # Whatever a damaged or hostile stream provokes in the parser means the same to the user.
        raise ValueError(f"{file}: not a readable checkpoint ({type(error).__name__}: {shortened(error)})") from error
    model = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise ValueError(f"{file}: must hold a dict with the key 'model', got {type(content).__name__}")
    for key, value in model.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"{file}: model must map names to tensors, got {shortened(key)}: {type(value).__name__}")
    if sum(value.numel() * value.element_size() for value in model.values()) > size:
        raise ValueError(f"{file}: the tensors of model must not share memory")
    return model


def _read_archive(archive: zipfile.ZipFile, size: int) -> object:
    """Return what an archive of a size holds."""
    records = archive.infolist()
    # torch.save does not compress. Records that overlap or unfold would let a small file fill the memory.
    if sum(record.file_size for record in records) > size:
        raise ValueError("its records must not be larger than the file")
    pickles = [record for record in records if record.filename.endswith("data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"must hold one data.pkl, got {len(pickles)}")
    (pickled,) = pickles
    if pickled.file_size > _LARGEST_PICKLE:
        raise ValueError(f"data.pkl must be at most {_LARGEST_PICKLE} bytes, got {pickled.file_size}")
    storages = _Storages(archive, pickled.filename.removesuffix("data.pkl"))
    return read_pickle(archive.read(pickled), _REBUILD, storages)


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
        pairs = tuple(zip(thresholds, windows, strict=True))
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        return assembled(
            lambda: LesaPredictor(inputs - 1, pairs, hidden, bases - order, order), shapes, state.__getitem__
        )
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{file}: not a LESA predictor of the published form: {shortened(error)}") from error

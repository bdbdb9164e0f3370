"""Reads checkpoints written by the published training script, without running any code from them."""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import re
import reprlib
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa_kernels.files import regular, shortened
from lesa_kernels.predictors.lesa import LesaPredictor
from lesa_kernels.predictors.saved import assembled

_PREFIX = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+")
_KEY = re.compile(r"^(latent|timestep)(?:_(cond|uncond))?\.([0-9]{1,3})\.(.+)$")
_PUBLISHED_THRESHOLDS = {False: (0.9, 0.5, 0.0), True: (0.9, 0.4, 0.0)}
# Of the part that describes the tensors, a few hundred bytes each.
_LARGEST_PICKLE = 1 << 20
_MOST_DIMENSIONS = 8
# Hashing tuples in tuples recurses in C: 100,000 deep it still fits an ordinary stack.
_MOST_TUPLES = 20_000
# What torch.save writes, and what the same data take in newer protocols. INST, OBJ and EXT find classes in other ways,
# and for bytes pickle takes memory before it sees that the data end.
_OPCODES = {
    *("PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "FLOAT"),
    *("BININT", "BININT1", "BININT2", "LONG1", "SHORT_BINUNICODE", "BINUNICODE", "UNICODE"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
    *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
}


class _Unknown:
    """Stands for every object that no checkpoint of ours needs; takes any arguments and any state, and keeps none."""

    def __new__(cls, *_: object) -> _Unknown:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        """Ignore the arguments."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class _Dict(dict[Any, Any]):
    """Stands for an OrderedDict, whose attributes (torch's `_metadata`) are dropped."""

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class _RebuildTensor:
    """Stands for torch's function; unlike a function, it has no attributes that a stream could set."""

    __slots__ = ()

    def __call__(self, storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Any:
        """Return a view of a storage that the file holds; of any other, such as one of integers, an `_Unknown`."""
        if not isinstance(storage, Tensor):
            return _Unknown()
        if len(size) > _MOST_DIMENSIONS or not all(isinstance(extent, int) for extent in size):
            raise ValueError(f"a tensor must have a shape of at most {_MOST_DIMENSIONS} integers")
        # Strides can make a tensor of any size from one element: the archive must hold every element.
        if math.prod(size) > storage.numel():
            raise ValueError(f"a tensor of shape {tuple(size)} has more elements than its storage, {storage.numel()}")
        return storage.as_strided(size, stride, offset)


class _RebuildParameter:
    """Stands for torch's function."""

    __slots__ = ()

    def __call__(self, tensor: object, *_: object) -> object:
        """Return the tensor itself."""
        return tensor


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "DoubleStorage"): torch.float64,
}


class _Unpickler(pickle.Unpickler):
    """Reads the pickle of an archive; every name in it becomes one of `_KNOWN` or an inert placeholder.

    Args:
        archive: the file.
        name: of the pickle in it.

    Raises:
        ValueError: when the pickle does what torch.save does not do.
    """

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        data = archive.read(name)
        _check_opcodes(data)
        super().__init__(io.BytesIO(data))
        self._archive = archive
        self._folder = name.removesuffix("data.pkl")
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name; a class of its own for an unknown one, so that nothing outlives the file."""
        known = _KNOWN.get((module, name))
        return type("_Unknown", (_Unknown,), {}) if known is None else known

    def persistent_load(self, persistent_id: Any) -> object:
        """Return the storage that a tensor refers to, as a flat tensor."""
        _, dtype, key, *_ = persistent_id
        if not isinstance(dtype, torch.dtype):
            return _Unknown()
        if not isinstance(key, str):
            raise ValueError("a storage's key must be a text")
        if key not in self._storages:
            # Reading a record whole checks its CRC.
            data = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _check_opcodes(data: bytes) -> None:
    """Refuse a stream whose reading could take more memory or stack than its size."""
    tuples = 0
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise ValueError(f"torch.save does not use the opcode {opcode.name}")
        if opcode.name == "LONG_BINPUT" and (argument or 0) > len(data):
            raise ValueError(f"a memo must be smaller than the pickle, got the number {argument}")
        tuples += opcode.name.startswith("TUPLE")
    if tuples > _MOST_TUPLES:
        raise ValueError(f"a pickle must hold at most {_MOST_TUPLES} tuples, got {tuples}")


def load_official(path: str | Path, *, thresholds: tuple[float, ...] | None = None) -> dict[str, LesaPredictor]:
    """Read a checkpoint of the published training script; sizes are inferred from its tensors.

    The file is a zip archive around a pickle `{config, model, optimizer, scheduler}`, of which only `model` is used.
    Nothing in it is executed: the pickle may name what it likes, all but tensors and containers becomes an inert
    placeholder. Memory is taken for a few times the size of the file at most. Keys may carry the prefixes
    `module.`, `model.` and `_orig_mod.`.

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
            raise ValueError(
                f"{file}: model must map names to tensors, got {reprlib.repr(key)}: {type(value).__name__}"
            )
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
    return _Unpickler(archive, pickled.filename).load()


def _build(file: Path, state: dict[str, Tensor], thresholds: tuple[float, ...]) -> LesaPredictor:
    """Make a predictor of the sizes in the state's shapes, and load the state strictly."""
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

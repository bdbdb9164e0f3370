"""Reads checkpoints written by the published training script, without running any code from them."""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import reprlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

from lesa_kernels.files import LARGEST_WEIGHTS, opened, shortened
from lesa_kernels.predictors.lesa import LesaPredictor
from lesa_kernels.predictors.saved import assembled

_PREFIX = re.compile(r"^(?:(?:module|model|_orig_mod)\.)+")
_KEY = re.compile(r"^(latent|timestep)(?:_(cond|uncond))?\.([0-9]{1,3})\.(.+)$")
_PUBLISHED_THRESHOLDS = {False: (0.9, 0.5, 0.0), True: (0.9, 0.4, 0.0)}
# Of the part that describes the tensors, a few hundred bytes each.
_LARGEST_PICKLE = 1 << 20
_MOST_DIMENSIONS = 8
# Stands for every object that no checkpoint of ours needs.
_UNKNOWN = object()
# Opcodes that pickle reads as it does anywhere: those of torch.save, and of the same data in newer protocols.
_AS_USUAL = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.LONG4, pickle.FLOAT, pickle.BINFLOAT),
    *(pickle.SHORT_BINUNICODE, pickle.BINUNICODE, pickle.UNICODE, pickle.EMPTY_DICT, pickle.EMPTY_LIST),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.BINPERSID),
)


def _rebuild_tensor(storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Any:
    """Return a view of a storage that the file holds; of any other, such as one of integers, a placeholder."""
    if not isinstance(storage, Tensor):
        return _UNKNOWN
    if len(size) > _MOST_DIMENSIONS or not all(isinstance(extent, int) for extent in size):
        raise ValueError(f"a tensor must have a shape of at most {_MOST_DIMENSIONS} integers")
    # Strides can make a tensor of any size from one element: the archive must hold every element.
    if math.prod(size) > storage.numel():
        raise ValueError(f"a tensor of shape {tuple(size)} has more elements than its storage, {storage.numel()}")
    return storage.as_strided(size, stride, offset)


def _empty_dict() -> dict[Any, Any]:
    """Return a dict; torch.save fills it item by item, and `dict` itself would hash what it is called with."""
    return {}


def _rebuild_parameter(tensor: object, *_: object) -> object:
    """Return the tensor itself."""
    return tensor


# The only objects that may be called, and the dtypes of storages.
_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _empty_dict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "FloatStorage"): torch.float32,
    ("torch", "HalfStorage"): torch.float16,
    ("torch", "BFloat16Storage"): torch.bfloat16,
    ("torch", "DoubleStorage"): torch.float64,
}


class _Opcodes(dict[int, Callable[[Any], None]]):
    """What an unpickler does for each opcode."""

    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise ValueError(f"torch.save does not use the opcode {bytes([code])!r}")


class _Unpickler(pickle._Unpickler):
    """Reads the pickle of an archive: builds tensors and containers, and a placeholder for everything else.

    Python's own in Python, as that in C hashes whatever is a key and sets whatever is a state. It imports nothing,
    calls nothing but the functions of `_KNOWN`, drops states and the items of unknown objects, and refuses other
    opcodes.

    Args:
        archive: the file.
        name: of the pickle in it.
    """

    # Of the base; its types are not published.
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    dispatch: ClassVar = _Opcodes({code[0]: pickle._Unpickler.dispatch[code[0]] for code in _AS_USUAL})

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        super().__init__(io.BytesIO(archive.read(name)))
        self._archive = archive
        self._folder = name.removesuffix("data.pkl")
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name."""
        return _KNOWN.get((module, name), _UNKNOWN)

    def persistent_load(self, persistent_id: Any) -> object:
        """Return the storage that a tensor refers to, as a flat tensor."""
        _, dtype, key, *_ = persistent_id
        if not isinstance(dtype, torch.dtype):
            return _UNKNOWN
        if not isinstance(key, str):
            raise ValueError("a storage's key must be a text")
        if key not in self._storages:
            # Reading a record whole checks its CRC.
            data = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]

    def _call(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        self.append(called(*arguments) if isinstance(called, FunctionType) else _UNKNOWN)

    def _drop(self) -> None:
        self.stack.pop()

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True) if isinstance(target, dict) else ():
            # Of tuples in tuples even the hash may take forever.
            target[key if isinstance(key, str | int) else _UNKNOWN] = value

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _append_set(self) -> None:
        self.append(_UNKNOWN)

    def _pop_set(self) -> None:
        self.pop_mark()
        self.append(_UNKNOWN)

    dispatch.update(
        {
            pickle.REDUCE[0]: _call,
            pickle.NEWOBJ[0]: _call,
            pickle.BUILD[0]: _drop,
            pickle.SETITEM[0]: _set_item,
            pickle.SETITEMS[0]: lambda self: self._set(self.pop_mark()),
            pickle.APPEND[0]: lambda self: self._extend([self.stack.pop()]),
            pickle.APPENDS[0]: lambda self: self._extend(self.pop_mark()),
            pickle.ADDITEMS[0]: lambda self: self._extend(self.pop_mark()),
            pickle.EMPTY_SET[0]: _append_set,
            pickle.FROZENSET[0]: _pop_set,
        }
    )


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
    with opened(file, LARGEST_WEIGHTS) as handle:
        return _read_open(handle, file)


def _read_open(handle: BinaryIO, file: Path) -> dict[str, Tensor]:
    """Return the tensors of `model` in an open file."""
    size = os.fstat(handle.fileno()).st_size
    try:
        with zipfile.ZipFile(handle) as archive:
            content = _read_archive(archive, size)
    except zipfile.BadZipFile as error:
        reason = f"no zip archive, or truncated: {error}"
        raise ValueError(f"{file}: not a checkpoint written by torch.save ({reason})") from error
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

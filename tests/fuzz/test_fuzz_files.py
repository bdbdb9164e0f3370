"""Files with random damage, configs and pickles: refused in a sentence that names them, or loaded whole."""

from __future__ import annotations

import codecs
import functools
import io
import json
import math
import pickle
import shutil
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from lesa_kernels import LesaPredictor, LinearPredictor, load_official, load_predictor
from lesa_kernels.training import FeatureStore
from lesa_kernels.training.checkpoint import Checkpoint
from lesa_kernels.trajectories import RecordedSource

STEPS = 4
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
WEIGHTS, CONFIG = "model.safetensors", "config.json"


class Kind(NamedTuple):
    """Files of a kind, and how they are loaded."""

    files: dict[str, bytes]
    load: Callable[[Path], object]


def lesa() -> LesaPredictor:
    return LesaPredictor(STEPS, ((0.9, 1), (0.5, 2), (0.0, 2)), 2, trained_sigmas=SIGMAS, full_steps=[0, 2])


def _kind(fill: Callable[[Path], object], load: Callable[[Path], object]) -> Kind:
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name[0] != "."}
    return Kind(files, load)


def _record(folder: Path) -> None:
    features = [[torch.full((1, 2), float(step)) for step in range(STEPS)] for _ in range(2)]
    FeatureStore.record(folder, RecordedSource(features, SIGMAS), model="small", dtype="float16", progress=False)


def _run_store(folder: Path) -> None:
    store = FeatureStore(folder)
    assert 0 < len(store) <= 2
    store.run(range(len(store)), lambda call: call.blocks() is None)  # type: ignore[arg-type,return-value]


def _separate(predictor: LesaPredictor | LinearPredictor) -> Callable[[Path], None]:
    """Write weights without a config of their own, so that the one beside them counts."""

    def fill(folder: Path) -> None:
        predictor.save_pretrained(folder)
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)

    return fill


@functools.cache
def kinds() -> dict[str, Kind]:
    checkpoint = Checkpoint({"sigmas": SIGMAS}, lesa().state_dict(), [0.5, 0.25], 3.0)
    return {
        "lesa": _kind(lesa().save_pretrained, load_predictor),
        "lesa, two files": _kind(_separate(lesa()), load_predictor),
        "linear": _kind(_separate(LinearPredictor(SIGMAS, [0, 2])), load_predictor),
        "official": _kind(
            lambda folder: torch.save({"model": lesa().state_dict(), "config": {"lr": 1e-4}}, folder / "file.pt"),
            lambda folder: load_official(folder / "file.pt"),
        ),
        "store": _kind(_record, _run_store),
        "checkpoint": _kind(checkpoint.save, Checkpoint.load),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all examples, after everything was loaded once: what is imported late would be slow."""
    folder = tmp_path_factory.mktemp("fuzz")
    for kind in kinds().values():
        fill(folder / "good", kind.files)
        kind.load(folder / "good")
    return folder


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut, flip bits in, overwrite or lengthen."""
    at = draw(st.integers(0, len(data) - 1))
    match draw(st.sampled_from(("cut", "flip", "header", "write", "insert"))):
        case "cut":
            return data[:at]
        case "flip":
            changed = bytearray(data)
            for place, bit in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 7)), max_size=8)):
                changed[place] ^= 1 << bit
            return bytes(changed)
        case "header":
            return struct.pack("<Q", draw(st.integers(0, 2**64 - 1))) + data[8:]
        case "write":
            new = draw(st.binary(max_size=64))
            return data[:at] + new + data[at + len(new) :]
        case _:
            return data[:at] + draw(st.binary(max_size=64)) + data[at:]


def refused_or(load: Callable[[Path], Any], path: Path) -> Any:
    """Load; what is refused must be refused by the right error, with the path."""
    with warnings.catch_warnings():
        # A config that is not that of the weights beside it is told, and the weights' own is taken.
        warnings.simplefilter("ignore", UserWarning)
        try:
            return load(path)
        except (ValueError, FileNotFoundError) as error:
            text = str(error)
    assert str(path) in text and len(text) < 1000
    return None


def fill(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("name", ["lesa", "lesa, two files", "linear", "official", "store", "checkpoint"])
@given(data=st.data())
def test_damaged_files(folder: Path, name: str, data: st.DataObject) -> None:
    kind = kinds()[name]
    file = data.draw(st.sampled_from(sorted(name for name in kind.files if name != "README.md")))
    fill(folder / "damaged", kind.files | {file: data.draw(damaged(kind.files[file]))})
    refused_or(kind.load, folder / "damaged")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8) | st.just(10**12),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize("name", ["lesa, two files", "linear"])
@given(data=st.data())
def test_random_configs(folder: Path, name: str, data: st.DataObject) -> None:
    kind = kinds()[name]
    config = json.loads(kind.files[CONFIG])
    names = st.sampled_from(sorted(config)) | st.text(max_size=8)
    config |= data.draw(st.dictionaries(names, JSON, min_size=1, max_size=3))
    for left_out in data.draw(st.lists(st.sampled_from(sorted(config)), max_size=1)):
        del config[left_out]
    fill(folder / "config", kind.files | {CONFIG: json.dumps(config).encode()})
    loaded = refused_or(kind.load, folder / "config")
    if loaded is not None:
        shapes = {key: value.shape for key, value in loaded.state_dict().items()}
        assert shapes == {key: value.shape for key, value in load_file(folder / "config" / WEIGHTS).items()}


SHAPES = st.lists(st.integers(0, 3), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn])


@pytest.mark.parametrize("name", ["lesa, two files", "official", "checkpoint"])
@given(data=st.data())
def test_random_tensors(folder: Path, name: str, data: st.DataObject) -> None:
    """Keys are missing, too many, or of other shapes and types."""
    kind, state = kinds()[name], dict(lesa().state_dict())
    names = st.sampled_from(sorted(state)) | st.text(max_size=20)
    for key, shape, dtype in data.draw(st.lists(st.tuples(names, SHAPES, DTYPES), max_size=3)):
        state[key] = torch.zeros(shape).to(dtype)
    for key in data.draw(st.lists(st.sampled_from(sorted(state)), max_size=2, unique=True)):
        del state[key]
    if name == "official":
        file = io.BytesIO()
        torch.save({"model": state}, file)
        files = {"file.pt": file.getvalue()}
    else:
        metadata = {"settings": "{}", "seconds": "1"} if name == "checkpoint" else None
        files = {next(file for file in kind.files if file.endswith("safetensors")): save(state, metadata)}
    fill(folder / "tensors", kind.files | files)
    loaded = refused_or(kind.load, folder / "tensors")
    if isinstance(loaded, LesaPredictor):
        assert {key: value.shape for key, value in loaded.state_dict().items()} == {
            key: value.shape for key, value in lesa().state_dict().items()
        }


@given(
    stamp=st.dictionaries(st.sampled_from(("model", "sigmas", "dtype", "runs", "identity")), JSON, max_size=2),
    facts=st.dictionaries(st.sampled_from(("shape", "dtype")), JSON, max_size=2),
    branches=JSON | st.none(),
)
def test_random_indices(folder: Path, stamp: dict[str, Any], facts: dict[str, Any], branches: Any) -> None:
    kind = kinds()["store"]
    index = json.loads(kind.files["index.json"])
    index["stamp"] |= stamp
    index["branches"]["cond"] |= facts
    if branches is not None:
        index["branches"] = branches
    fill(folder / "index", kind.files | {"index.json": json.dumps(index).encode()})
    refused_or(kind.load, folder / "index")


class _Events:
    """What the interpreter audits while it is told to listen; there is no way to take a hook away."""

    def __init__(self) -> None:
        self.heard: list[str] | None = None
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.heard is not None and event.partition(".")[0] in ("os", "subprocess", "pickle", "import", "exec"):
            self.heard.append(f"{event} {arguments[:1]}")


@pytest.fixture(scope="module")
def events() -> Iterator[_Events]:
    # The interpreter's own, which names in archives and texts in pickles need.
    for encoding in ("cp437", "latin-1", "ascii", "unicode_escape", "raw_unicode_escape"):
        codecs.lookup(encoding)
    listener = _Events()
    yield listener
    listener.heard = None


MEMBERS = st.sampled_from(
    [
        *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"c__builtin__\nexec\n", b"csubprocess\nPopen\n"),
        *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n"),
        *(b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"coperator\nattrgetter\n", b"ctorch\nload\n"),
    ]
)
TEXTS = st.sampled_from(["model", "touch marker", "storage", "0", "cpu", "latent.0.weight", "os", "system"])
OPCODES = st.one_of(
    MEMBERS,
    TEXTS.map(lambda text: b"X" + struct.pack("<I", len(text)) + text.encode()),
    st.integers(0, 255).map(lambda number: b"K" + bytes([number])),
    st.integers(-(2**31), 2**31 - 1).map(lambda number: b"J" + struct.pack("<i", number)),
    st.integers(0, 3).map(lambda place: b"q" + bytes([place])),
    st.integers(0, 3).map(lambda place: b"h" + bytes([place])),
    st.sampled_from([bytes([code]) for code in b"()]}NtRbsuaeQ.0125\x81\x85\x86\x87\x88\x89\x8f\x91\x93\x94d"]),
    st.binary(min_size=1, max_size=4),
)


@given(program=st.lists(OPCODES, max_size=40), protocol=st.sampled_from([b"", b"\x80\x02", b"\x80\x04"]))
def test_random_pickles_run_no_code(folder: Path, events: _Events, program: list[bytes], protocol: bytes) -> None:
    file = folder / "pickle.pt"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("file/data.pkl", protocol + b"".join(program) + b".")
        archive.writestr("file/data/0", bytes(16))
    events.heard = []
    refused_or(load_official, file)
    heard, events.heard = events.heard, None
    assert not heard


def test_the_listener_hears(events: _Events) -> None:
    events.heard = []
    pickle.loads(b"cmath\nsqrt\n.")
    heard, events.heard = events.heard, None
    assert "pickle.find_class ('math',)" in heard


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=4))
def test_numbers_that_are_none_are_refused_where_they_would_be_used(folder: Path, values: list[float]) -> None:
    predictor = lesa()
    with torch.no_grad():
        predictor.latent[2].weight[0, : len(values[:2])] = torch.tensor(values[:2])
    fill(folder / "values", {})
    predictor.save_pretrained(folder / "values")
    loaded = load_predictor(folder / "values")
    if all(map(math.isfinite, values[:2])):
        return
    with pytest.raises(ValueError, match="must be finite"):
        loaded.plan(SIGMAS)

"""Files that mean harm, and a process that opens them: `hostile_files.py FOLDER` tells what came of each.

It may take 512 MiB beyond what torch takes, and a minute of computing; beyond that the system ends it.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lesa_kernels import LesaPredictor, LinearPredictor, load_official, load_predictor
from lesa_kernels.training import FeatureStore, checkpoint
from lesa_kernels.training.checkpoint import Checkpoint

MARKER = "marker"
MEMORY, SECONDS = 512 << 20, 60
SIGMAS = [1 - step / 10 for step in range(11)]
Make = Callable[[Path], Path]


class Calls:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[object, ...]:
        return self.call


def harm(marker: Path) -> dict[str, Calls]:
    """Name the ways to leave a marker."""
    command = f"touch {marker}"
    code = f"__import__('os').system({command!r})"
    return {"system": Calls(os.system, command), "eval": Calls(eval, code), "exec": Calls(exec, code)}


def _twice(number: int) -> bytes:
    """Make a pair of the last object and itself."""
    place = struct.pack("<I", number)
    return b"r" + place + b"j" + place + b"\x86"


def pickles(marker: Path) -> dict[str, bytes]:
    """Pickles of torch.save's form and of other forms."""
    found = {
        f"{name}-{protocol}": pickle.dumps({"model": {"a": calls}}, protocol)
        for name, calls in harm(marker).items()
        for protocol in range(6)
    }
    member = b"cos\nsystem\n"
    text = b"X" + struct.pack("<I", len(f"touch {marker}")) + f"touch {marker}".encode()
    call = member + text + b"\x85R"
    found |= {
        "inst": b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n.",
        "obj": b"(" + member + text + b"o.",
        "newobj": b"\x80\x02" + member + text + b"\x85\x81.",
        "state of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__NsN\x86b.",
        "key of a dict": b"\x80\x02}" + call + b"Ns.",
        "persistent id": b"\x80\x02" + call + b"Q.",
        "storage of a tensor": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + call + b"K\x00))tR.",
        "a memo of 16 GiB": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "bytes of 1 TiB": b"\x80\x05\x8e" + struct.pack("<Q", 1 << 40) + b".",
        "a bytearray of 1 TiB": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        "state of a class": b"\x80\x02cos\nsystem\n}X\x0c\x00\x00\x00__setstate__Nsb.",
        "attributes of a class": b"\x80\x02cos\nsystem\nN}X\x08\x00\x00\x00__init__Ns\x86b.",
        "a key that takes forever to hash": b"\x80\x02})" + b"".join(_twice(n) for n in range(60)) + b"Ns.",
        "a dict of a key that takes forever to hash": (
            b"\x80\x02ccollections\nOrderedDict\n])" + b"".join(_twice(n) for n in range(60)) + b"N\x86a\x85R."
        ),
        "80,000 names": b"\x80\x02(" + b"cos\nsystem\n" * 80_000 + b"t.",
        "a key of tuples in tuples": b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
        "a name of tuples in tuples": b"\x80\x04)" + b"\x85" * 200_000 + b"\x8c\x01a\x93)R.",
        "a list in itself": b"\x80\x02]q\x00h\x00a.",
        "a model in itself": b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.",
        "no end": b"\x80\x02}",
        "nothing": b"",
        "an empty stack": b"\x80\x02R.",
        "lists in lists": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "a long number": b"I" + b"9" * 900_000 + b"\n.",
    }
    # A shape whose product has gigabytes: a number of 100 kB, 50,000 times.
    long = b"\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000 + b"q\x01"
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    found["a shape of long numbers"] = (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00(" + long + b"h\x01" * 50_000 + b"t)tR."
    )
    return found


def archive(data: bytes, **records: bytes) -> Make:
    """Lay out an archive as torch.save does."""

    def make(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "file.pt", "w") as opened:
            opened.writestr("file/data.pkl", data)
            opened.writestr("file/data/0", bytes(16))
            for name, content in records.items():
                opened.writestr(f"file/{name}", content)
        return folder / "file.pt"

    return make


def _bomb(folder: Path) -> Path:
    file = folder / "file.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as opened:
        opened.writestr("file/data.pkl", pickle.dumps({}))
        with opened.open("file/data/0", "w") as record:
            for _ in range(300):
                record.write(bytes(2 << 20))
    return file


def _moved(file: Path, by: int) -> None:
    """Move the content of a file behind a hole."""
    content = file.read_bytes()
    with file.open("wb") as opened:
        opened.seek(by)
        opened.write(content)


def _sharing(folder: Path) -> Path:
    whole = torch.zeros(1 << 20)
    state = {f"latent.{index}.weight": whole[: len(whole) - index] for index in range(999)}
    torch.save({"model": state}, folder / "file.pt")
    return folder / "file.pt"


def _expanded(folder: Path) -> Path:
    torch.save({"model": {"latent.0.bias": torch.zeros(1).expand(1 << 45)}}, folder / "file.pt")
    return folder / "file.pt"


def _wide(folder: Path) -> Path:
    """Name sizes whose product the file does not hold."""
    state = LesaPredictor(1, hidden_dim=1).state_dict()
    state["timestep.0.layers.0.spline_weight"] = torch.zeros(1 << 16, 2, 8)
    torch.save({"model": state}, folder / "file.pt")
    return folder / "file.pt"


def official(marker: Path) -> dict[str, Make]:
    found = {f"pickle: {name}": archive(data) for name, data in pickles(marker).items()}
    end = b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 3) + b"PK\x05\x06" + bytes(18)
    files: dict[str, Callable[[Path], object]] = {
        "an archive on three disks": lambda file: file.write_bytes(bytes(100) + end),
        "an archive of zeros": lambda file: file.write_bytes(bytes(100)),
        "a hole of 1 TiB": lambda file: (file.touch(), os.truncate(file, 1 << 40)),
        "a hole of 1 GiB before an archive": lambda file: (archive(b"N.")(file.parent), _moved(file, 1 << 30)),
        "a folder": Path.mkdir,
        "a pipe": os.mkfifo,
        "/dev/zero": lambda file: file.symlink_to("/dev/zero"),
        "itself": lambda file: file.symlink_to(file),
        "a link to nothing": lambda file: file.symlink_to("nothing"),
    }
    found |= {name: placed("file.pt", write, itself=True) for name, write in files.items()}
    found["many pickles"] = archive(b"N.", **{"other/data.pkl": b"N."})
    found |= {"zip bomb": _bomb, "tensors that share": _sharing, "expanded": _expanded, "wide": _wide}
    return found


def configured(kind: type[LesaPredictor | LinearPredictor] = LesaPredictor, **entries: Any) -> Make:
    """Make a folder whose config says something else than its weights, which have none of their own."""

    def make(folder: Path) -> Path:
        predictor = LesaPredictor(10, hidden_dim=4) if kind is LesaPredictor else LinearPredictor(SIGMAS, [0, 5])
        predictor.save_pretrained(folder)
        save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text()) | entries
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def replaced(name: str, write: Callable[[Path], object]) -> Make:
    """Make a folder in which something else stands for one of its files."""

    def make(folder: Path) -> Path:
        configured()(folder)
        (folder / name).unlink()
        write(folder / name)
        return folder

    return make


def header(length: int, **entries: Any) -> Callable[[Path], object]:
    """Write a safetensors file that claims a header of a length."""
    text = json.dumps(entries).encode()
    return lambda file: file.write_bytes(struct.pack("<Q", length or len(text)) + text)


def sparse(shapes: dict[str, Sequence[int]], dtype: str = "F32", **metadata: str) -> Callable[[Path], object]:
    """Write a safetensors file of one hole: its tensors are zeros that take no room on the disk."""
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * int(dtype[1:]) // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}

    def write(file: Path) -> None:
        header(0, **entries)(file)
        os.truncate(file, file.stat().st_size + end)

    return write


def wide(hidden_dim: int) -> Make:
    """Make a folder whose config and weights fit together, and would fill the memory."""

    def make(folder: Path) -> Path:
        configured(hidden_dim=hidden_dim)(folder)
        with torch.device("meta"):
            state = LesaPredictor(10, hidden_dim=hidden_dim).state_dict()
        sparse({name: tensor.shape for name, tensor in state.items()})(folder / "model.safetensors")
        return folder

    return make


def tensor(shape: list[int], end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}


FOLDERS: dict[str, Make] = {
    "num_steps of a trillion": configured(num_steps=10**12),
    "num_steps of 30 digits": configured(num_steps=10**30),
    "num_steps of 3000 digits": configured(num_steps=10**3000),
    "num_steps is a text": configured(num_steps="10"),
    "num_steps is true": configured(num_steps=True),
    "hidden_dim of a trillion": configured(hidden_dim=10**12),
    "grid_size of a trillion": configured(grid_size=10**12),
    "spline_order of a trillion": configured(spline_order=10**12),
    "100,000 stages": configured(stages=[[-index, 1] for index in range(100_000)]),
    "windows of a trillion": configured(stages=[[0.5, 10**12]]),
    "infinite threshold": configured(stages=[[float("inf"), 4]]),
    "infinite window": configured(stages=[[0.5, float("inf")]]),
    "stages are numbers": configured(stages=[1, 2]),
    "NaN in the sigmas": configured(trained_sigmas=[1.0, float("nan"), *SIGMAS[2:]]),
    "infinite sigmas": configured(trained_sigmas=[float("inf"), *SIGMAS[1:]]),
    "sigmas of 400 digits": configured(trained_sigmas=[10**400, *SIGMAS[1:]]),
    "too few sigmas": configured(trained_sigmas=SIGMAS[1:]),
    "steps beyond the schedule": configured(full_steps=[0, 10**12]),
    "100,000 full steps": configured(full_steps=list(range(100_000))),
    "schedule without its start": configured(full_steps=[1, 2]),
    "of a later version": configured(format=2),
    "predictor is a list": configured(predictor=[]),
    "predictor is of another kind": configured(predictor="LinearPredictor"),
    "window of a trillion": configured(LinearPredictor, window=10**12),
    "over_all and other sizes": configured(LinearPredictor, window=4),
    "linear sigmas rise": configured(LinearPredictor, sigmas=SIGMAS[::-1]),
    "linear without sigmas": configured(LinearPredictor, sigmas=None),
    "nested JSON": replaced("config.json", lambda file: file.write_text("[" * 10**6)),
    "nested objects": replaced("config.json", lambda file: file.write_text('{"a":' * 10**5 + "1" + "}" * 10**5)),
    "long number": replaced("config.json", lambda file: file.write_text('{"num_steps": ' + "9" * 10**6 + "}")),
    "large JSON": replaced("config.json", lambda file: file.write_text('{"a": [' + "[]," * 10**7 + "0]}")),
    "no UTF-8": replaced("config.json", lambda file: file.write_bytes(b"\xff\xfe\xfd")),
    "empty config": replaced("config.json", lambda file: file.touch()),
    "config is a folder": replaced("config.json", Path.mkdir),
    "config is /dev/zero": replaced("config.json", lambda file: file.symlink_to("/dev/zero")),
    "config is a pipe": replaced("config.json", os.mkfifo),
    "config is itself": replaced("config.json", lambda file: file.symlink_to(file)),
    "weights are a folder": replaced("model.safetensors", Path.mkdir),
    "weights are /dev/zero": replaced("model.safetensors", lambda file: file.symlink_to("/dev/zero")),
    "weights are a pipe": replaced("model.safetensors", os.mkfifo),
    "weights are a pickle": replaced("model.safetensors", lambda file: torch.save({}, file)),
    "weights of 45 GiB that are a hole": wide(20_000),
    "weights of 1 GiB that are a hole": wide(3_000),
    "empty weights": replaced("model.safetensors", lambda file: file.touch()),
    "a header of 8 EiB": replaced("model.safetensors", header(2**63)),
    "a header of 1 TiB": replaced("model.safetensors", header(2**40)),
    "a tensor of 4 TiB": replaced("model.safetensors", header(0, a=tensor([2**40], 2**42))),
    "a shape of 2**64": replaced("model.safetensors", header(0, a=tensor([2**32, 2**32], 0))),
    "a shape of nothing": replaced("model.safetensors", header(0, a=tensor([0, 2**40], 0))),
    "a config of before that is none": replaced("model.safetensors", header(0, __metadata__={"config": "[" * 10**5})),
    "a config of before that is another": replaced("model.safetensors", header(0, __metadata__={"config": "{}"})),
    "a digest of another config": replaced("model.safetensors", header(0, __metadata__={"config_sha256": "0"})),
}


def placed(name: str, write: Callable[[Path], object], *, itself: bool = False) -> Make:
    """Make a folder that holds one file; it is loaded, or the file itself."""

    def make(folder: Path) -> Path:
        write(folder / name)
        return folder / name if itself else folder

    return make


def main(folder: Path) -> None:
    """Open all, and print a line of JSON for each."""
    endless: dict[str, Callable[[Path], object]] = {
        "a pipe": os.mkfifo,
        "/dev/zero": lambda file: file.symlink_to("/dev/zero"),
        "a header of 1 TiB": header(2**40),
    }
    checkpoints = endless | {
        f"{losses} losses in a hole": sparse({"losses": [losses]}, "F64", settings="{}", seconds="1")
        for losses in (20_000_000, 1 << 37)
    }
    kinds: dict[str, tuple[Callable[[Path], object], dict[str, Make]]] = {
        "official": (load_official, official(folder / MARKER)),
        "predictor": (load_predictor, FOLDERS),
        "store": (FeatureStore, {name: placed("index.json", write) for name, write in endless.items()}),
        "checkpoint": (Checkpoint.load, {name: placed(checkpoint.FILE, write) for name, write in checkpoints.items()}),
    }
    made: list[tuple[str, Callable[[Path], object], Path]] = []
    for kind, (load, files) in kinds.items():
        for number, (name, make) in enumerate(files.items()):
            place = folder / f"{kind}-{number}"
            place.mkdir()
            made.append((f"{kind}: {name}", load, make(place)))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + SECONDS,) * 2)
    for name, load, path in made:
        begin, said = time.process_time(), "nothing"
        try:
            load(path)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        told = {"name": name, "path": str(path), "said": said, "seconds": time.process_time() - begin}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

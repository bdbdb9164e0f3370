"""A process that runs out of space: `full_disk.py FOLDER [BYTES]` prints what each writer said and what was left.

Without a number the folder's file system is filled up; with one, no file may be longer than so many bytes.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import torch
from small_training import SCHEDULE, SHORT, Meddling, equal, runs, small_predictor
from torch import Tensor

from lesa_kernels import LesaPredictor
from lesa_kernels.training import FeatureStore, train
from lesa_kernels.training.checkpoint import FILE

# In the second batch of the training, in the second run of the recording.
HALF = 30


def stop(_: Tensor) -> Tensor:
    raise KeyboardInterrupt


@contextlib.contextmanager
def full(folder: Path, longest: int | None) -> Generator[None, None, None]:
    """Leave no space for a while."""
    if longest is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (longest, hard))
        yield
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        return
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    ballast.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def main(folder: Path, longest: int | None) -> None:
    torch.set_num_threads(1)
    place, out, store = folder / "predictor", folder / "training", folder / "store"
    source, config = runs(2), SHORT
    want = small_predictor(1)
    train(want, source, SCHEDULE, config, progress=False)

    small_predictor(3).save_pretrained(place)
    with contextlib.suppress(KeyboardInterrupt):
        train(small_predictor(1), Meddling(source, HALF, stop), SCHEDULE, config, out=out, progress=False)
    with contextlib.suppress(KeyboardInterrupt):
        FeatureStore.record(store, Meddling(source, HALF, stop), model="small", progress=False)

    def record() -> None:
        FeatureStore.record(store, source, model="small", progress=False)

    trained = small_predictor(2)
    writers: dict[Path, Callable[[], object]] = {
        place: lambda: small_predictor(4).save_pretrained(place),
        out: lambda: train(trained, source, SCHEDULE, config, out=out, progress=False, save_seconds=0),
        store: record,
    }
    for path, write in writers.items():
        before, said = contents(path), "nothing"
        with full(folder, longest):
            try:
                write()
            except OSError as error:
                said = f"{type(error).__name__}: {error}"
        after = contents(path)
        # A checkpoint is written after the other files of a training.
        kept = all(after[name] == data for name, data in before.items() if path != out or name == FILE)
        told = {"path": str(path), "said": said, "kept": kept, "more": sorted(after.keys() - before.keys())}
        write()
        print(json.dumps(told))
    assert equal(trained, want), "the training did not go on where it was"
    assert equal(LesaPredictor.from_pretrained(place), small_predictor(4))
    assert len(FeatureStore(store)) == len(source)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)

"""Keeps features of unaccelerated runs on disk, for epochs over the same runs without sampling them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from lesa_kernels.checks import check_decreasing
from lesa_kernels.files import opened_tensors, parsed, read_json, replacing, shortened
from lesa_kernels.training.progress import progress_bar
from lesa_kernels.training.ranks import Ranks, lock_folder
from lesa_kernels.trajectories import ModelCall, StepPolicy, TrajectorySource, check_single_model, watch

_INDEX = "index.json"
_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float8_e4m3fn")}
# Their range is smaller than that of bfloat16 features: what is stored is divided by a scale of each tensor.
_SCALED = ("float16", "float8_e4m3fn")
_SIGMA_TOLERANCE = 1e-4
# What safetensors calls the types that features may have.
_CODES = {"float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float32": "F32", "float64": "F64"}


class FeatureStore:
    """A source of features in a folder that `record` filled: one memory-mapped safetensors file a run, and an index.

    One step's feature is in memory at a time; its calls have neither tail nor latents.

    Args:
        folder: of the store.
        model: name of the model that the features must be from, None for any.
        sigmas: the S+1 noise levels that the runs must have, None for any.
        dtype: of the features that policies get; None for that of the recorded ones.
        device: of the features that policies get.

    Raises:
        FileNotFoundError: when the store has no index (its recording did not end), or a file is missing.
        ValueError: when a file is not whole, or the store is of another model or of other sigmas.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: str | None = None,
        sigmas: Sequence[float] | None = None,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self._stamp: dict[str, Any] = index["stamp"]
        self._branches: dict[str, dict[str, Any]] = index["branches"]
        self._dtype = dtype
        self._device = torch.device(device)
        if model is not None and model != self.model:
            raise ValueError(f"{self.folder}: must hold features of {model}, it holds those of {self.model}")
        if sigmas is not None:
            self._check_sigmas([float(sigma) for sigma in sigmas])
        for run in range(len(self)):
            self._check_shard(run)

    @property
    def model(self) -> str:
        """Name of the model that the features are from."""
        return str(self._stamp["model"])

    @property
    def identity(self) -> str | None:
        """Which runs of the source were recorded, None where it has no identity."""
        identity: str | None = self._stamp.get("identity")
        return identity

    @property
    def sigmas(self) -> tuple[float, ...]:
        """See `TrajectorySource.sigmas`."""
        return tuple(self._stamp["sigmas"])

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches of guidance, in the order of their calls."""
        return tuple(self._branches)

    def __len__(self) -> int:
        """How many runs there are."""
        return int(self._stamp["runs"])

    def run(self, runs: Sequence[int], policy: StepPolicy) -> None:
        """See `TrajectorySource.run`."""
        with ExitStack() as stack:
            files = [stack.enter_context(_opened(_shard(self.folder, run), self._stamp)) for run in runs]

            def feature(step: int, branch: str) -> Tensor:
                features = [self._feature(file, step, branch) for file in files]
                return features[0] if len(features) == 1 else torch.cat(features)

            for step in range(len(self.sigmas) - 1):
                for branch in self._branches:
                    policy(ModelCall(step, lambda step=step, branch=branch: feature(step, branch), branch=branch))  # type: ignore[misc]

    def _feature(self, file: Any, step: int, branch: str) -> Tensor:
        """Read a feature, undo its scale and bring it to the wanted dtype and device."""
        name = _name(step, branch)
        stored: Tensor = file.get_tensor(name).to(self._device)
        dtype = self._dtype or getattr(torch, self._branches[branch]["dtype"])
        if self._stamp["dtype"] in _SCALED:
            stored = stored.float() * file.get_tensor(_scale(name)).to(self._device)
        return stored.to(dtype)

    def _check_sigmas(self, wanted: list[float]) -> None:
        """Check that the runs have these noise levels, but for rounding."""
        own = self.sigmas
        if len(own) != len(wanted):
            raise ValueError(f"{self.folder}: must hold runs of {len(wanted) - 1} steps, it holds {len(own) - 1}")
        gaps = [abs(a - b) for a, b in zip(own, wanted, strict=True)]
        step = max(range(len(gaps)), key=gaps.__getitem__)
        if gaps[step] > _SIGMA_TOLERANCE:
            raise ValueError(
                f"{self.folder}: must have sigma {wanted[step]:.4f} at step {step}, it has {own[step]:.4f}"
            )

    def _check_shard(self, run: int) -> None:
        """Check that the file of a run holds all features as the index says."""
        file = _shard(self.folder, run)
        if not file.is_file():
            raise FileNotFoundError(f"{file}: must be there, the store has {len(self)} runs")
        with _opened(file, self._stamp) as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
            found = {name: (each.get_shape(), each.get_dtype()) for name, each in slices.items()}
        scaled = self._stamp["dtype"] in _SCALED
        for branch, facts in self._branches.items():
            dtype = _CODES[self._stamp["dtype"] or facts["dtype"]]
            for step in range(len(self.sigmas) - 1):
                name = _name(step, branch)
                shape, code = found.get(name, (None, None))
                if shape != facts["shape"]:
                    raise ValueError(f"{file}: step {step} of {branch!r} must have shape {facts['shape']}, got {shape}")
                if code != dtype:
                    raise ValueError(f"{file}: step {step} of {branch!r} must be of type {dtype}, got {code}")
                if scaled and found.get(_scale(name)) != ([], "F32"):
                    raise ValueError(f"{file}: step {step} of {branch!r} must have a scale of type F32")

    @classmethod
    def record(
        cls,
        folder: str | Path,
        source: TrajectorySource,
        *,
        model: str,
        dtype: str | None = None,
        progress: bool = True,
    ) -> FeatureStore:
        """Sample all runs of a source and keep their features; runs that the folder holds already are left out.

        The size is shown as soon as the first step's features are known. One run is held in memory at a time.
        Processes of `torch.distributed` share the runs; the folder must be the same for all.

        Args:
            folder: made if missing.
            source: the runs.
            model: a name for the model; opening the store can require it.
            dtype: of the stored features: "bfloat16", "float16" or "float8_e4m3fn", the last two with a float32 scale
                for each tensor; None for their own.
            progress: show the size and a bar.

        Returns:
            The store, opened.

        Raises:
            ValueError: when the folder holds a recording with other arguments, or runs differ in shape.
            BlockingIOError: when another process records in the folder.
            OSError: when the folder cannot be written to, or the disk has not enough room.
            FloatingPointError: when a feature is not finite.
        """
        if dtype is not None and dtype not in _DTYPES:
            raise ValueError(f"dtype must be None or one of {', '.join(_DTYPES)}, got {dtype!r}")
        folder = Path(folder)
        stamp = {"model": model, "sigmas": list(source.sigmas), "dtype": dtype, "runs": len(source)}
        stamp["identity"] = getattr(source, "identity", None)
        ranks = Ranks()
        with ExitStack() as stack:
            ranks.from_first(lambda: stack.enter_context(lock_folder(folder)))
            # One process reads the folder: another one would find what this one has recorded since.
            missing = ranks.from_first(lambda: _missing(folder, stamp))
            if missing is not None:
                bar = stack.enter_context(progress_bar(progress and ranks.writes))
                task = bar.add_task("recording", total=len(source), completed=len(source) - len(missing))
                recorder = _RunRecorder(folder, stamp, len(missing), bar)
                for run in missing[ranks.own :: ranks.count]:
                    recorder.begin(run)
                    source.run([run], recorder)
                    recorder.save()
                    bar.update(task, advance=ranks.count)
                ranks.wait()
                ranks.from_first(lambda: _write_index(folder, stamp))
        return cls(folder)


class _RunRecorder:
    """A policy that keeps the features of a run in the host's memory, and then writes them.

    Args:
        folder: of the store.
        stamp: of the recording, see `FeatureStore.record`.
        missing: how many runs have to be recorded.
        bar: prints their size.
    """

    def __init__(self, folder: Path, stamp: Mapping[str, Any], missing: int, bar: Progress) -> None:
        self._folder = folder
        self._stamp = stamp
        self._missing = missing
        self._bar = bar
        self._sized = False
        self._branches: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, Tensor] = {}
        self._run = -1

    def begin(self, run: int) -> None:
        """Prepare for a run."""
        self._run = run
        self._tensors = {}

    @torch.no_grad()
    def __call__(self, call: ModelCall) -> Tensor | None:
        """Answer a call in full, and keep its feature."""
        check_single_model(call)
        feature, output = watch(call)
        facts = {"shape": list(feature.shape), "dtype": str(feature.dtype).removeprefix("torch.")}
        if not self._sized and call.step == 0:
            self._branches[call.branch] = facts
        elif not self._sized:
            self._check_room()
        if self._branches.get(call.branch) != facts:
            raise ValueError(
                f"run {self._run}, step {call.step}, branch {call.branch!r}: the feature must be as in the first step "
                f"that was recorded, {self._branches.get(call.branch)}, got {facts}"
            )
        self._keep(_name(call.step, call.branch), feature)
        return output

    def _keep(self, name: str, feature: Tensor) -> None:
        """Copy a feature to the host, scaled to the range of its stored type."""
        dtype = self._stamp["dtype"]
        largest = feature.abs().amax().float()
        if not largest.isfinite():
            raise FloatingPointError(f"run {self._run}: feature {name} must be finite, its largest is {largest}")
        if dtype in _SCALED:
            scale = torch.where(largest > 0, largest / torch.finfo(_DTYPES[dtype]).max, 1.0)
            self._tensors[_scale(name)] = scale.cpu()
            feature = feature.float() / scale
        # A copy: the model may write to its feature later on.
        self._tensors[name] = feature.to("cpu", _DTYPES.get(dtype, feature.dtype), copy=True).contiguous()

    def _check_room(self) -> None:
        """Compare what all missing runs will take with the room on the disk, once all branches are known."""
        self._sized = True
        of_run = sum(tensor.nbytes for tensor in self._tensors.values()) * (len(self._stamp["sigmas"]) - 1)
        needed, free = of_run * self._missing, shutil.disk_usage(self._folder).free
        text = (
            f"{self._missing} runs of {decimal(of_run)} need {decimal(needed)} in {self._folder}, {decimal(free)} free"
        )
        if needed > free:
            raise OSError(f"the features must fit on the disk: {text}")
        if not self._bar.disable:
            self._bar.console.print(text)

    def save(self) -> None:
        """Write the run's file, whole or not at all; refuse a run that left out a step."""
        steps = range(len(self._stamp["sigmas"]) - 1)
        for name in (_name(step, branch) for step in steps for branch in self._branches):
            if name not in self._tensors:
                raise ValueError(f"source must run all steps of each branch, run {self._run} left out {name}")
        metadata = {"stamp": json.dumps(self._stamp), "branches": json.dumps(self._branches)}
        with replacing(_shard(self._folder, self._run)) as file:
            save_file(self._tensors, file, metadata)


def _name(step: int, branch: str) -> str:
    """Return the name of a feature."""
    return f"{branch}/{step:04d}"


def _scale(name: str) -> str:
    """Return the name of a feature's scale."""
    return f"{name}.scale"


def _shard(folder: Path, run: int) -> Path:
    """Return the file of a run."""
    return folder / f"run-{run:06d}.safetensors"


@contextmanager
def _opened(file: Path, stamp: Mapping[str, Any]) -> Generator[Any, None, None]:
    """Open a run's file and check that it is whole and belongs to a recording."""
    with opened_tensors(file) as tensors:
        found = parsed((tensors.metadata() or {}).get("stamp", "{}"), file)
        _check_stamp(file, found, stamp)
        yield tensors


def _check_stamp(file: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that a file belongs to a recording with this stamp."""
    for name, value in wanted.items():
        if found.get(name) != value:
            raise ValueError(f"{file}: is of another recording: {name} is {found.get(name)}, wanted {value}")


def _missing(folder: Path, stamp: Mapping[str, Any]) -> list[int] | None:
    """Return the runs that are still to be recorded, None where the recording has ended."""
    if (folder / _INDEX).is_file():
        _check_stamp(folder / _INDEX, _read_index(folder)["stamp"], stamp)
        return None
    return [run for run in range(stamp["runs"]) if not _is_recorded(folder, run, stamp)]


def _is_recorded(folder: Path, run: int, stamp: Mapping[str, Any]) -> bool:
    """Whether a run has a file; refuse one of another recording."""
    file = _shard(folder, run)
    if not file.is_file():
        return False
    with _opened(file, stamp):
        return True


def _read_index(folder: Path) -> dict[str, Any]:
    """Read and check the index of a store."""
    file = folder / _INDEX
    if not file.exists():
        raise FileNotFoundError(f"{file}: must be there; it is written when a recording ends, so go on with it")
    try:
        index = read_json(file)
        stamp, branches = dict(index["stamp"]), dict(index["branches"])
        stamp["sigmas"] = list(check_decreasing(stamp["sigmas"]))
        good = stamp["dtype"] in (None, *_DTYPES) and type(stamp["runs"]) is int and stamp["runs"] > 0
        for facts in branches.values():
            good = good and facts["dtype"] in _CODES and isinstance(facts["shape"], list)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: must be the index of a store of features: {shortened(error)}") from error
    if not (good and branches):
        raise ValueError(f"{file}: must be the index of a store of features: a count, shape or type is none")
    return {"stamp": stamp, "branches": branches}


def _write_index(folder: Path, stamp: Mapping[str, Any]) -> None:
    """Write the index, once all runs are recorded."""
    for run in range(stamp["runs"]):
        if not _is_recorded(folder, run, stamp):
            raise FileNotFoundError(f"{_shard(folder, run)}: must have been recorded; record again")
    with _opened(_shard(folder, 0), stamp) as first:
        branches = json.loads(first.metadata()["branches"])
    with replacing(folder / _INDEX) as file:
        file.write_text(json.dumps({"stamp": stamp, "branches": branches}, indent=1), encoding="utf-8")

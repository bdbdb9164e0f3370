"""`lesa train`: a predictor for a pipeline and its prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from lesa_kernels.cli.checks import check_device, check_modules
from lesa_kernels.cli.methods import METHODS, Job, Method
from lesa_kernels.integrations import PipelineSource
from lesa_kernels.training import FeatureStore
from lesa_kernels.trajectories import ONLY_BRANCH, TrajectorySource


class Precision(str, Enum):
    """Of a pipeline."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class StorePrecision(str, Enum):
    """Of the features in a store."""

    float16 = "float16"
    bfloat16 = "bfloat16"
    float8_e4m3fn = "float8_e4m3fn"


def train(
    model: Annotated[str, typer.Option(help="Folder or hub id of a diffusers pipeline.")],
    out: Annotated[Path, typer.Option(help="Folder for the predictor, its losses and checkpoints.", file_okay=False)],
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with a prompt a line.", exists=True, dir_okay=False)
    ] = None,
    runs: Annotated[
        int | None, typer.Option(help="Runs to learn from; prompts are repeated with other noise.", min=1)
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=2)] = 50,
    interval: Annotated[
        int | None, typer.Option(help="Of the published schedule; 7 for tuned and published.", min=1)
    ] = None,
    calls: Annotated[
        int | None, typer.Option(help="Or: so many full steps, uniform in sigma; LESA's own begin with four.", min=1)
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Or: as many as let a batch of runs last so long on this machine.")
    ] = None,
    decibels: Annotated[
        float | None, typer.Option(help="Or: as few as bring the final latents so near: -20 log10(relative error).")
    ] = None,
    search: Annotated[
        int, typer.Option(help="Placements of the full steps to try with TaylorSeer; a budget tries 40.", min=0)
    ] = 0,
    refine: Annotated[
        int, typer.Option(help="Placements to try from there on with a fit for each, which takes longer.", min=0)
    ] = 0,
    method: Annotated[Method, typer.Option(help="How to learn.")] = Method.tuned,
    epochs: Annotated[
        tuple[int, int] | None, typer.Option(help="With true history, then in closed loop; else as the method says.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Else as the method says.")] = None,
    batch: Annotated[int, typer.Option(help="Runs at once.", min=1)] = 1,
    guidance: Annotated[float | None, typer.Option(help="guidance_scale of the pipeline's call.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="More of the pipeline's call: height=1024, true_cfg_scale=4.")
    ] = None,
    capture: Annotated[str | None, typer.Option(help="Submodule whose first argument is the feature.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where it is.")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Of the pipeline; bfloat16, on a CPU float32.")] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep on the GPU only the part that runs.")] = False,
    store: Annotated[
        Path | None, typer.Option(help="Sample once, keep the features in this folder, learn from there.")
    ] = None,
    store_dtype: Annotated[StorePrecision, typer.Option(help="Of the features in the store.")] = StorePrecision.float16,
    seed: Annotated[int, typer.Option(help="Of the noise and of the predictor's first weights.")] = 0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write its scalars too.")] = False,
) -> None:
    """Train a predictor for a diffusers pipeline, while it samples; started again, it goes on where it was stopped."""
    check_modules("lesa train", "diffusers", "matplotlib")
    if sum(each is not None for each in (interval, calls, seconds, decibels)) > 1:
        raise typer.BadParameter("--interval, --calls, --seconds and --decibels say which steps are full: give one")
    place = _device(device)
    console = Console(quiet=_rank() > 0)
    with _processes(), _one_line():
        texts = _texts(prompts, runs)
        arguments = _arguments(settings or []) | ({} if guidance is None else {"guidance_scale": guidance})
        pipe = _load(model, place, dtype, offload)
        source = PipelineSource(pipe, texts, steps=steps, seed=seed, capture=capture, **arguments)
        # Further calls of a step, without a name of their own, find the predictor of the first one.
        branches = tuple(branch for branch in source.branches if branch.isidentifier())
        console.print(_intention(source, branches, method), soft_wrap=True)
        job = Job(
            source=source if store is None else _stored(source, store, store_dtype, place, console),
            branches=branches,
            out=out,
            device=place,
            interval=interval,
            calls=calls,
            seconds=seconds,
            decibels=decibels,
            search=search,
            refine=refine,
            batch=batch,
            epochs=epochs,
            learning_rate=learning_rate,
            seed=seed,
            tensorboard=tensorboard,
            console=console,
        )
        told = METHODS[method](job)
    if console.quiet:
        return
    console.print(told, soft_wrap=True)
    files = sorted(str(path) for path in out.iterdir() if not path.name.startswith("."))
    console.print(f"files: {', '.join(files)}", soft_wrap=True)
    console.print("\n" + _how_to_use(out, branches), markup=False, highlight=False, soft_wrap=True)


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if torch.distributed.is_torchelastic_launched() else 0


@contextmanager
def _processes() -> Generator[None, None, None]:
    """Join the processes that torchrun started, if it did."""
    if not torch.distributed.is_torchelastic_launched():
        yield
        return
    torch.distributed.init_process_group()
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _one_line() -> Generator[None, None, None]:
    """Say what is wrong with what a user asked for without a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    except FloatingPointError as error:
        typer.echo(f"Stopped: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo("Interrupted: the same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(130) from None


def _device(device: str | None) -> str:
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(place)
    if place == "cuda":
        place = f"cuda:{os.environ['LOCAL_RANK'] if torch.distributed.is_torchelastic_launched() else 0}"
    if place.startswith("cuda"):
        torch.cuda.set_device(place)
    return place


def _load(model: str, device: str, dtype: Precision | None, offload: bool) -> Any:
    """Load a pipeline."""
    usual = "bfloat16" if device.startswith("cuda") else "float32"
    kind: torch.dtype = getattr(torch, usual if dtype is None else dtype.value)
    from lesa_kernels.integrations.sampling import load_pipeline

    return load_pipeline(model, device=device, dtype=kind, offload=offload)


def _texts(prompts: Path | None, runs: int | None) -> list[str]:
    """Return the prompt of each run."""
    if prompts is not None:
        texts = [line.strip() for line in prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not texts:
            raise typer.BadParameter(f"--prompts {prompts} must hold a prompt a line, it holds none")
    else:
        raise typer.BadParameter("--prompts must name a text file with a prompt a line")
    return [texts[run % len(texts)] for run in range(runs or len(texts))]


def _arguments(settings: list[str]) -> dict[str, Any]:
    """Read name=value; a value that is JSON is what JSON says, any other is a text."""
    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.isidentifier():
            raise typer.BadParameter(f"--set must be name=value, got {setting}")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
    return found


def _stored(
    source: PipelineSource, folder: Path, dtype: StorePrecision, device: str, console: Console
) -> TrajectorySource:
    """Record what of a store is missing, and open it."""
    FeatureStore.record(folder, source, dtype=dtype.value, model=source.model, progress=not console.quiet)
    return FeatureStore(folder, model=source.model, sigmas=source.sigmas, device=device)


def _intention(source: PipelineSource, branches: tuple[str, ...], method: Method) -> str:
    """Say what is going to happen."""
    steps = len(source.sigmas) - 1
    guided = f", branches {' and '.join(branches)}" if branches != (ONLY_BRANCH,) else ""
    return f"{source.model}: {len(source)} runs of {steps} steps{guided}; method {method.value}"


def _how_to_use(out: Path, branches: tuple[str, ...]) -> str:
    """Return the lines of Python that use what was trained."""
    predictor = f'lesa.load_predictor("{out}")'
    if len(branches) > 1:
        predictor = "{" + ", ".join(f'"{branch}": lesa.load_predictor("{out / branch}")' for branch in branches) + "}"
    return (
        "To use it, where pipe is the pipeline:\n\n"
        "import lesa_kernels as lesa\n"
        f"predictor = {predictor}\n"
        "lesa.enable(pipe, predictor)"
    )

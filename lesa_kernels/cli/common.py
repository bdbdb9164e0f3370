"""Provides what the commands share: options, checks, the pipeline and its prompts, processes, and error lines."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from lesa_command import INTERRUPTED, give_up_output, is_of_output
from lesa_kernels.files import read_lines
from lesa_kernels.integrations import PipelineSource
from lesa_kernels.schedule import Schedule
from lesa_kernels.training.progress import waiting

RUNS, MACHINE = "Runs to learn from", "Machine"


class Precision(str, Enum):
    """Floating point type of a pipeline."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Model = Annotated[str, typer.Argument(help="Folder or hub id of a diffusers pipeline.", show_default=False)]
Prompts = Annotated[
    Path,
    typer.Option(
        help="Text file with one prompt a line; each is one run.",
        exists=True,
        dir_okay=False,
        show_default=False,
        rich_help_panel=RUNS,
    ),
]
Out = Annotated[Path, typer.Option(help="Folder for the results.", file_okay=False, show_default=False)]
Steps = Annotated[int, typer.Option(help="Sampling steps.", min=2, rich_help_panel=RUNS)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Argument of the pipeline's call, such as guidance_scale=3.5 or height=1024; repeatable.",
        metavar="NAME=VALUE",
        rich_help_panel=RUNS,
    ),
]
Batch = Annotated[int, typer.Option(help="Runs sampled at once.", min=1, rich_help_panel=RUNS)]
Seed = Annotated[int, typer.Option(help="Seed of the noise and of first weights.", rich_help_panel=RUNS)]
Capture = Annotated[
    str | None,
    typer.Option(
        help="For a model without an entry: the submodule whose first argument is forecast.",
        rich_help_panel=RUNS,
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda if there is one.", rich_help_panel=MACHINE)
]
Dtype = Annotated[
    Precision | None,
    typer.Option(help="Type of the pipeline. Default: bfloat16, on a CPU float32.", rich_help_panel=MACHINE),
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep on the GPU only the part that runs.", rich_help_panel=MACHINE)
]


@dataclass(frozen=True)
class Pipeline:
    """Which pipeline to load, what to sample with it, and where; the options above."""

    model: str
    prompts: Path
    steps: int
    settings: list[str] | None
    seed: int
    capture: str | None
    device: str
    dtype: Precision | None
    offload: bool

    def source(self, console: Console) -> PipelineSource:
        """Load the pipeline and return its runs."""
        from lesa_kernels.integrations import pipeline_source

        # Read before the pipeline is loaded, which takes long.
        texts, arguments = _prompts(self.prompts), _call_arguments(self.settings or [])
        usual = "bfloat16" if self.device.startswith("cuda") else "float32"
        dtype: torch.dtype = getattr(torch, self.dtype.value if self.dtype else usual)
        # diffusers shows how far it has come.
        console.print(f"loading {self.model}")
        pipe = pipeline_source.load_pipeline(self.model, device=self.device, dtype=dtype, offload=self.offload)
        source = PipelineSource(pipe, texts, steps=self.steps, seed=self.seed, capture=self.capture, **arguments)
        with waiting("reading the noise levels of the pipeline's scheduler", not console.quiet):
            steps = len(source.sigmas) - 1
        console.print(f"{source.model}: {len(source)} runs of {steps} steps", soft_wrap=True)
        return source

    def next_lines(self, predictor: str) -> str:
        """Return the lines of Python that use a predictor."""
        arguments = ", ".join([f"num_inference_steps={self.steps}", *(self.settings or [])])
        capture = "" if self.capture is None else f', capture="{self.capture}"'
        return (
            f"Next, where pipe is the pipeline of {self.model}:\n\n"
            "import lesa_kernels as lesa\n"
            f"predictor = {predictor}\n"
            f"lesa.enable(pipe, predictor{capture})  # then call pipe with {arguments}"
        )


def loading(branches: Collection[str], folder: Path) -> str:
    """Return the expression that loads what `save_predictors` wrote."""
    if len(branches) == 1:
        return f'lesa.load_predictor("{folder}")'
    return "{" + ", ".join(f'"{branch}": lesa.load_predictor("{folder / branch}")' for branch in branches) + "}"


def make_console() -> Console:
    """Return the console; that of all but the first process of torchrun is quiet."""
    launched = torch.distributed.is_torchelastic_launched()
    return Console(quiet=launched and os.environ.get("RANK", "0") != "0")


def check_modules(command: str, *modules: str) -> None:
    """Refuse to start where a module is missing."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise typer.BadParameter(f"{command} needs {module}: pip install -e .[train]")


def check_device(device: str) -> None:
    """Refuse a device that torch does not see."""
    if re.fullmatch(r"cpu|cuda(:\d+)?", device) is None:
        raise typer.BadParameter(f"--device must be cpu, cuda or cuda:N, got {device}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter(f"device {device} is not there: torch {torch.__version__} sees no CUDA device")


def place(device: str | None) -> str:
    """Return the device to use, with its number, and make it torch's current one."""
    found = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(found)
    if found == "cuda":
        found = f"cuda:{os.environ['LOCAL_RANK'] if torch.distributed.is_torchelastic_launched() else 0}"
    if found.startswith("cuda"):
        torch.cuda.set_device(found)
    return found


@contextmanager
def command(interrupted: str) -> Generator[None, None, None]:
    """Join the processes that torchrun started, if it did, and turn errors and Ctrl-C into one line."""
    launched = torch.distributed.is_torchelastic_launched()
    try:
        if launched:
            torch.distributed.init_process_group()
        yield
    except OSError as error:
        if is_of_output(error):
            give_up_output(error)
        raise typer.BadParameter(str(error)) from error
    except (ValueError, TypeError, ModuleNotFoundError) as error:
        raise typer.BadParameter(str(error)) from error
    except FloatingPointError as error:
        typer.echo(f"Stopped: {error}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        typer.echo(interrupted, err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        if launched and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _prompts(file: Path) -> list[str]:
    """Read a prompt a line."""
    texts = read_lines(file)
    if not texts:
        raise typer.BadParameter(f"--prompts {file} must hold a prompt a line, it holds none")
    return texts


def _call_arguments(settings: list[str]) -> dict[str, Any]:
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


def full_steps(schedule: Schedule) -> str:
    """Describe a schedule in one line."""
    steps = " ".join(map(str, schedule.full_steps))
    return f"blocks run on {len(schedule.full_steps)} steps, {schedule.speedup:.2f} x fewer: {steps}"


def show_files(folder: Path, console: Console) -> None:
    """List the files of a folder."""
    files = sorted(str(path) for path in folder.iterdir() if not path.name.startswith("."))
    console.print(f"files: {', '.join(files)}", soft_wrap=True)

"""The command `lesa` with the digits model in the place of any other; as a script, for tests that start processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples.digits.pipeline import DigitsPipeline
from lesa_command import run
from lesa_kernels.cli import app
from lesa_kernels.integrations import pipeline_source


def load(model: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, offload: bool = False) -> Any:
    """Load the digits pipeline, whatever the model's name."""
    return DigitsPipeline.load(device, dtype)


def write_prompts(folder: Path, count: int) -> str:
    """Write a file of so many digits, a line each."""
    file = folder / f"{count}-prompts.txt"
    file.write_text("".join(f"{run % 10}\n" for run in range(count)))
    return str(file)


def message(result: Any) -> str:
    """Return the text of an error without the box around it."""
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return " ".join(result.output.replace("│", " ").split())


def use(output: str, pipe: Any) -> None:
    """Run the lines that a command ends with."""
    code = output[output.index("import lesa_kernels as lesa") :]
    assert len(code.strip().splitlines()) == 3
    exec(code, {"pipe": pipe})


def program() -> Callable[[], object]:
    """Return the command."""
    pipeline_source.load_pipeline = load
    return partial(app, prog_name="lesa")


if __name__ == "__main__":
    run(program)

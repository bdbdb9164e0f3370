"""`lesa train`, from what is typed to a predictor that serves the pipeline."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (extra: train)")
pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra: train)")

from digits_command import load, message, use, write_prompts
from torch.cuda._utils import _get_device_index
from typer.testing import CliRunner

import lesa_kernels as lesa
from examples.digits.model import conditioning
from examples.digits.pipeline import DigitsPipeline
from lesa_kernels.cli import app, common
from lesa_kernels.integrations import pipeline_source
from lesa_kernels.training import TrainingConfig

SMALL = ["--steps", "14", "--interval", "4", "--batch", "2"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load digits for every model, and train for one epoch in each phase."""
    monkeypatch.setattr(pipeline_source, "load_pipeline", load)
    quick = replace(TrainingConfig.tuned(), teacher_forcing_epochs=1, closed_loop_epochs=1)
    monkeypatch.setattr(TrainingConfig, "tuned", lambda: quick)


def run(model: str, *arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["train", model, *map(str, arguments)])


def run_digits(out: Path, *more: str | Path, count: int = 4) -> Any:
    return run("digits", "--prompts", write_prompts(out.parent, count), "--out", out, *SMALL, *more)


def train_digits(out: Path, *more: str | Path) -> str:
    result = run_digits(out, *more)
    assert result.exit_code == 0, result.output
    return str(result.output)


class Guided(DigitsPipeline):
    """Digits with guidance: two calls of the model a step, in contexts of their own."""

    @torch.no_grad()
    def __call__(  # type: ignore[override]
        self,
        prompt: list[str],
        num_inference_steps: int = 50,
        generator: list[torch.Generator] | None = None,
        guidance_scale: float = 1.0,
        size: int = 28,
    ) -> torch.Tensor:
        assert size == 14
        generators = generator or [torch.Generator()]
        tokens = torch.cat([torch.randn(1, 49, 16, generator=each) for each in generators])
        self.scheduler.set_timesteps(num_inference_steps, mu=1.15)
        for t in self.scheduler.timesteps:
            outputs = []
            for name, labels in (("cond", [int(text) for text in prompt]), ("uncond", [0] * len(prompt))):
                with self.transformer.cache_context(name):
                    fixed = conditioning(torch.tensor(labels))
                    time = t.expand(len(tokens)) / 1000
                    outputs.append(self.transformer(tokens, timestep=time, **fixed, return_dict=False)[0])
            velocity = outputs[1] + guidance_scale * (outputs[0] - outputs[1])
            tokens = self.scheduler.step(velocity, t, tokens, return_dict=False)[0]
        return tokens


def test_digits_train_a_predictor_that_serves_them(tmp_path: Path) -> None:
    told = train_digits(tmp_path / "out")
    assert "4 runs of 14 steps" in told
    assert "branches cond; blocks run on 9 steps, 1.56 x fewer: 0 1 2 3 4 5 6 7 10; 3 more than" in told
    for name in ("losses.csv", "loss.png", "model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).is_file() and name in told
    pipe = DigitsPipeline.load()
    pipe.set_progress_bar_config(disable=True)
    use(told, pipe)
    pipe(["3", "7"], 14, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    summary = lesa.summary(pipe)
    assert (summary.refused, summary.full, summary.forecast) == (None, 9, 5)


def test_a_finished_training_is_not_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_digits(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(pipeline_source.PipelineSource, "run", lambda *_: pytest.fail("sampled again"))
    train_digits(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_another_training_does_not_overwrite_it(tmp_path: Path) -> None:
    train_digits(tmp_path)
    told = message(run_digits(tmp_path, "--seed", "1"))
    assert "holds another training:" in told and "config.seed was 0, now 1" in told


def test_the_published_recipe(tmp_path: Path) -> None:
    result = run_digits(tmp_path, "--recipe", "published", count=2)
    assert result.exit_code == 0, result.output
    losses = (tmp_path / "losses.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in losses[1:]] == ["teacher forcing", "closed loop", "closed loop"]


def test_a_store_is_filled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_digits(tmp_path / "one", "--store", tmp_path / "store")
    assert (tmp_path / "store" / "index.json").is_file()
    monkeypatch.setattr(pipeline_source.PipelineSource, "run", lambda *_: pytest.fail("sampled again"))
    train_digits(tmp_path / "two", "--store", tmp_path / "store")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
    other = run_digits(tmp_path / "three", "--store", tmp_path / "store", "--steps", "9")
    assert "store" in message(other)


def test_a_pipeline_with_branches_gets_a_predictor_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_guided(model: str, **options: Any) -> Guided:
        asked.update(options, model=model)
        return Guided(*DigitsPipeline.load().components.values())

    monkeypatch.setattr(pipeline_source, "load_pipeline", load_guided)
    (tmp_path / "prompts.txt").write_text("3\n\n 7 \n")
    arguments = [
        "--set",
        "guidance_scale=2.0",
        "--set",
        "size=14",
        "--dtype",
        "float16",
        "--offload",
        "--device",
        "cpu",
    ]
    result = run("some/model", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out", *SMALL, *arguments)
    assert result.exit_code == 0, result.output
    assert asked == {"model": "some/model", "device": "cpu", "dtype": torch.float16, "offload": True}
    assert "branches cond and uncond" in result.output
    pipe = load_guided("")
    use(result.output, pipe)
    pipe(["3"], 14, size=14)
    summary = lesa.summary(pipe)
    assert (summary.refused, summary.full, summary.forecast) == (None, 18, 10)
    stages = lesa.LesaPredictor.from_pretrained(tmp_path / "out" / "cond").stages
    assert stages == ((0.9, 4), (0.4, 8), (0.0, 8))


def test_two_processes_train_together(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(Path(__file__).with_name("digits_command.py")), "train", "digits", "--recipe", "published"]
    arguments = [*script, "--prompts", write_prompts(tmp_path, 4), "--device", "cpu", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        [*command, *arguments, *SMALL], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Next, where pipe is") == 1, "one process speaks"
    lesa.LesaPredictor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--interval", "1"], "schedule must leave a step to forecast"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N, got tpu"),
        (["--set", "height"], "--set must be name=value, got height"),
        (["--set", "guidance_scale=2"], "DigitsPipeline, which takes no guidance_scale"),
        (["--capture", "nowhere"], "no submodule 'nowhere'"),
        (["--prompts", "cats.txt"], "prompt must be a digit from 0 to 9, got 'a cat'"),
        (["--prompts", "empty.txt"], "empty.txt must hold a prompt a line, it holds none"),
        (["--prompts", "none.txt"], "'none.txt' does not exist"),
    ],
)
def test_bad_input_is_told_in_a_line(
    arguments: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cats.txt").write_text("a cat\n")
    Path("empty.txt").write_text(" \n")
    assert expected in message(run_digits(tmp_path / "out", *arguments))


def test_a_model_that_is_none_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    result = run(".", "--prompts", write_prompts(tmp_path, 1), "--out", "out")
    assert "must be a folder or a hub id of a diffusers pipeline, got ." in message(result)


def test_a_gpu_is_named_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    # What torch.cuda.set_device does first, which refuses "cuda".
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(_get_device_index(device)))
    assert [common.place(name) for name in (None, "cuda", "cuda:1", "cpu")] == [
        "cuda:0",
        "cuda:0",
        "cuda:1",
        "cpu",
    ]
    assert chosen == [0, 0, 1]


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (FloatingPointError("the target is not finite at step 3"), 1, "Stopped: the target is not finite at step 3"),
        (KeyboardInterrupt(), 130, "the same command goes on where it was stopped"),
    ],
)
def test_what_ends_a_training_early_is_told(
    error: BaseException, code: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    source = pipeline_source.PipelineSource
    monkeypatch.setattr(source, "branches", ("cond",))
    monkeypatch.setattr(source, "run", fail)
    result = run_digits(tmp_path)
    assert result.exit_code == code and expected in result.output

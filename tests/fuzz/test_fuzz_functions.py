"""Wrong arguments of the public functions: an error that names the argument, or an answer; never another exception."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lesa_kernels as lesa
from lesa_kernels import training
from lesa_kernels.integrations import default_schedule
from lesa_kernels.trajectories import ModelCall

STEPS = 6
SIGMAS = [1 - step / STEPS for step in range(STEPS + 1)]
SCHEDULE = lesa.Schedule.explicit(STEPS, (0, 1, 4))
FEATURE = torch.randn(2, 3, 4)
RUNS = [[torch.randn(2, 3, 4) for _ in range(STEPS)] for _ in range(2)]
WRONG: list[Any] = [
    None, "", "sigma", "nowhere", b"x", True, -1, 0, 1, 3, 1.5, float("nan"), float("inf"), -float("inf"), 1j, object(),
    10**12, 2**63, 10**30, -(2**70), [], (), {}, [None], ["x"], [1.0], [0], [[0]], {"a": 1}, range(3), Exception,
    [float("nan")] * (STEPS + 1), [0.5] * (STEPS + 1), SIGMAS[::-1], SIGMAS[:-1], [*SIGMAS, -1.0], [1e300, *SIGMAS[1:]],
    torch.tensor(1), torch.zeros(0), torch.zeros(STEPS + 1), torch.ones(2, 2, dtype=torch.int64), torch.float32,
    torch.int8, torch.int64, lambda *_: None, SCHEDULE, lesa.Reuse(), lesa.Schedule(3, (0,)),
]  # fmt: skip
# More than any of these calls takes, less than what a wrong number could make it take.
LONGEST = 5.0


def _plan(**options: Any) -> lesa.Plan:
    return lesa.TaylorSeer(1).plan(**{"sigmas": SIGMAS, "schedule": SCHEDULE, **options})


def _session(step: int = 0) -> lesa.Session:
    session = lesa.Session(_plan())
    for full in range(step):
        session.push(full, FEATURE)
    return session


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
        self.norm_out = torch.nn.Identity()

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.norm_out(self.blocks[0](latents))


def _enable(**arguments: Any) -> None:
    model = Small()
    lesa.enable(arguments.pop("target", model), **arguments)
    with torch.no_grad():
        for _ in range(STEPS):
            model(FEATURE)


def _recorded() -> training.RecordedSource:
    return training.RecordedSource(RUNS, SIGMAS)


def _loop(runs: Any, policy: Any) -> None:
    """A model whose feature is the hyperbolic tangent of its latents, sampled by Euler's steps."""
    latents = torch.linspace(-1, 1, len(runs) * 12).view(len(runs), 3, 4)
    for step in range(STEPS):
        output = policy(ModelCall(step, lambda latents=latents: latents.tanh(), torch.sin, latents))
        latents = latents + (SIGMAS[step + 1] - SIGMAS[step]) * output


def _tailed() -> training.LoopSource:
    return training.LoopSource(_loop, 2, SIGMAS)


def _record(**arguments: Any) -> None:
    with lesa.recorded(**arguments):
        pass


def _fitted() -> lesa.LinearPredictor:
    return training.fit(_tailed(), SCHEDULE, window=2, rounds=2, progress=False)


def _trained(**arguments: Any) -> object:
    given = {"predictor": lesa.LesaPredictor(**LESA), "source": _recorded(), "schedule": SCHEDULE,
             "config": training.TrainingConfig(1, 1), "progress": False}  # fmt: skip
    return training.train(**given | arguments)


LESA = {"num_steps": STEPS, "stages": ((0.5, 2), (0.0, 2)), "hidden_dim": 2, "grid_size": 3, "spline_order": 2,
        "trained_sigmas": SIGMAS, "full_steps": [0, 1, 4]}  # fmt: skip
LINEAR = {"sigmas": SIGMAS, "full_steps": [0, 1, 4], "window": 2, "over_all": False}
SEARCH = {"judge": lambda schedule: float(sum(schedule.full_steps)), "placements": 3, "progress": False}
PREDICTOR = lesa.LesaPredictor(**LESA)
# Name -> how it is called, and valid arguments.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Schedule": (lesa.Schedule, {"num_steps": STEPS, "full_steps": (0, 3)}),
    "Schedule.interval": (lesa.Schedule.interval, {"num_steps": STEPS, "interval": 3, "warmup": 2}),
    "Schedule.explicit": (lesa.Schedule.explicit, {"num_steps": STEPS, "full_steps": [0, 3]}),
    "Schedule.uniform_in_sigma": (lesa.Schedule.uniform_in_sigma, {"sigmas": SIGMAS, "num_full": 3, "warmup": 1}),
    "Schedule.growing": (lesa.Schedule.growing, {"num_steps": STEPS, "interval": 2.0, "growth": 0.5, "warmup": 1}),
    "TaylorSeer": (lesa.TaylorSeer, {"order": 1, "variable": "sigma"}),
    "HiCache": (lesa.HiCache, {"order": 1, "contraction": 0.5}),
    "Spectrum": (lesa.Spectrum, {"degree": 2, "ridge": 0.1, "weight": 0.5, "variable": "step", "free_constant": True}),
    "LesaPredictor": (lesa.LesaPredictor, LESA),
    "LinearPredictor": (lesa.LinearPredictor, LINEAR),
    "plan": (_plan, {"sigmas": SIGMAS, "schedule": SCHEDULE, "first_step": 0, "chunk": 1, "check_every": 1,
                     "on_other_sigmas": "refuse"}),
    "Plan.describe": (_plan().describe, {"shape": (2, 3), "itemsize": 2}),
    "Session": (lesa.Session, {"plan": _plan(), "history_dtype": None}),
    "Session.push": (lambda **a: _session().push(**a), {"step": 0, "feature": FEATURE}),
    "Session.forecast": (lambda **a: _session(2).forecast(**a), {"step": 2}),
    "enable": (_enable, {"predictor": lesa.TaylorSeer(1), "schedule": SCHEDULE, "sigmas": SIGMAS, "capture": "norm_out",
                         "history_dtype": None, "on_other_sigmas": "refuse", "chunk": None, "check_every": 1,
                         "max_error": 1.0, "scheduler": None}),
    "enable target": (lesa.enable, {"target": Small(), "sigmas": SIGMAS}),
    "disable": (lesa.disable, {"target": Small()}),
    "summary": (lesa.summary, {"target": Small()}),
    "Recorded": (training.RecordedSource, {"trajectories": RUNS, "sigmas": SIGMAS}),
    "TrainingConfig": (training.TrainingConfig, vars(training.TrainingConfig())),
    "train": (_trained, {"schedule": SCHEDULE, "source": _recorded(), "config": training.TrainingConfig(1, 1),
                         "predictor": lesa.LesaPredictor(**LESA), "progress": False}),
    "Sampled": (training.LoopSource, {"loop": _loop, "count": 2, "sigmas": SIGMAS}),
    "fit": (training.fit, {
        "source": _tailed(), "schedule": SCHEDULE, "window": 2,
        "rounds": 2, "batch": 1, "progress": False}),
    "default_schedule": (default_schedule, {"sigmas": SIGMAS}),
    "Evaluator": (training.Evaluator, {"source": _tailed(), "batch": 1, "progress": False}),
    "Evaluator()": (training.Evaluator(_tailed(), progress=False), {
        "predictor": lesa.TaylorSeer(1), "schedule": SCHEDULE}),
    "SelectedRuns": (training.SelectedRuns, {"source": _tailed(), "runs": [1]}),
    "even_schedules": (training.even_schedules, {"sigmas": SIGMAS, "calls": 3}),
    "search_schedule": (training.search_schedule, {**SEARCH, "start": SCHEDULE}),
    "fewest_calls": (training.fewest_calls, {**SEARCH, "sigmas": SIGMAS, "psnr_db": 3.0}),
    "quality_curve": (training.quality_curve, {**SEARCH, "sigmas": SIGMAS, "calls": [2, 3], "like": SCHEDULE}),
    "LesaPredictor.stage": (PREDICTOR.stage, {"t": 0.5}),
    "LesaPredictor.gain": (PREDICTOR.gain, {"sigmas": SIGMAS, "t": 0.5, "stage": 0}),
    "LesaPredictor.parameters_at": (PREDICTOR.parameters_at, {"sigmas": SIGMAS, "t": 0.5}),
    "LesaPredictor.forward": (PREDICTOR, {"history": [FEATURE, FEATURE], "sigmas": SIGMAS, "t": 0.5}),
    "recorded": (_record, {"target": Small(), "capture": None}),
}  # fmt: skip


def check(name: str, argument: str, wrong: Any) -> None:
    """Call with one argument replaced."""
    call, valid = CALLS[name]
    arguments = {key: copy.deepcopy(value) for key, value in valid.items()} | {argument: wrong}
    before = wrong.clone() if isinstance(wrong, torch.Tensor) else copy.deepcopy(wrong)
    began, told = time.monotonic(), f"{name}({argument}={wrong!r})"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(**arguments)
    except (TypeError, ValueError, RuntimeError) as error:
        message = str(error)
        # A schedule is a schedule, whatever the argument is called.
        named = any(word in message for word in (argument, argument.removesuffix("s"), type(wrong).__name__.lower()))
        if not named:
            raise AssertionError(f"{told} is refused without its name: {message}") from error
    except Exception as error:
        raise AssertionError(f"{told} ends in {error!r}") from error
    assert time.monotonic() - began < LONGEST, f"{told} takes {time.monotonic() - began:.1f} s"
    if isinstance(wrong, list | dict):
        assert repr(wrong) == repr(before), f"{told} changed its argument"


# Flags are read as Python reads truth.
PLACES = [(name, key) for name, (_, valid) in CALLS.items() for key in valid if key not in ("progress", "over_all")]


@pytest.mark.parametrize("name", CALLS)
def test_valid_calls_pass(name: str) -> None:
    if name != "summary":
        call, valid = CALLS[name]
        call(**copy.deepcopy(valid))


@given(place=st.sampled_from(PLACES), wrong=st.sampled_from(WRONG))
def test_wrong_arguments_are_named(place: tuple[str, str], wrong: Any) -> None:
    check(*place, wrong)

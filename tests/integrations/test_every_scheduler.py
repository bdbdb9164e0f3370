"""Every scheduler that diffusers exports: forecasts by the formula at levels that fall to 0, or refused by name."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils import logging
from tiny_flux import CHANNELS, NUM_BLOCKS, call_arguments, tiny_transformer, watching
from torch import Tensor

from lesa_kernels import Predictor, Reuse, Schedule, TaylorSeer
from lesa_kernels.integrations import LesaWarning, enable, summary
from lesa_kernels.integrations.levels import Levels, has_index, read_levels

# Its steps do not move its index, so a run ends in full steps for want of one.
STANDING = "HeliosDMDScheduler"
CLASSES = sorted(name for name in dir(diffusers) if name.endswith("Scheduler") and name != STANDING)
# Where these are parameters of a class, each value is tried.
OPTIONS: dict[str, tuple[Any, ...]] = {
    "use_karras_sigmas": (True,),
    "use_exponential_sigmas": (True,),
    "use_beta_sigmas": (True,),
    "use_flow_sigmas": (True,),
    "use_lu_lambdas": (True,),
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "prediction_type": ("v_prediction",),
    "interpolation_type": ("log_linear",),
    "sigma_schedule": ("exponential",),
    "invert_sigmas": (True,),
    "skip_prk_steps": (True,),
    "rescale_betas_zero_snr": (True,),
}
# What classes cannot be made without.
REQUIRED: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 7},
    "HeliosScheduler": {"stages": 1},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 2.0, "tsr_sigma": 0.25},
    "PiflowScheduler": {"n_grid": 2},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
}
SECOND_ORDER = [name for name in CLASSES if "Heun" in name or "KDPM2" in name]
COUNTS = [(1, 2, 4, 10), pytest.param((50,), marks=pytest.mark.exhaustive)]
PREDICTORS = (Reuse(), TaylorSeer(order=1, variable="sigma"))

# How diffusers hands torch's tensors to NumPy, what it says of its old classes, and divisions by 0 at one step.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread", "_quiet"),
]


@pytest.fixture
def _quiet() -> Any:
    """Keep diffusers' log silent: it remarks on many of these configs."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def configs(name: str) -> list[dict[str, Any]]:
    """The configs that a class is tried with: the default one, each option, and pairs that change where sigmas end."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    taken = [{option: value} for option in OPTIONS if option in parameters for value in OPTIONS[option]]
    if "timestep_type" in parameters:
        taken.append({"timestep_type": "continuous", "prediction_type": "v_prediction"})
    if "use_flow_sigmas" in parameters:
        taken.append({"use_flow_sigmas": True, "prediction_type": "flow_prediction"})
    if "final_sigmas_type" in parameters:
        taken += [each | {"final_sigmas_type": "sigma_min"} for each in taken if "use" in next(iter(each))]
    return [REQUIRED.get(name, {}) | each for each in ({}, *taken)]


def step_of(scheduler: Any, output: Tensor, t: Any, latents: Tensor) -> Tensor:
    """Return the latents after a scheduler's step, kept within what a model of random weights can take."""
    known = {
        "model_output": output, "timestep": t, "sample": latents, "generator": torch.Generator().manual_seed(0),
        "old_pred_original_sample": None, "timestep_back": None, "original_image": latents, "mask": latents,
    }  # fmt: skip
    name = type(scheduler).__name__
    if name == "DDPMWuerstchenScheduler":
        known["timestep"] = t.reshape(1)
    if name == "PiflowScheduler":
        known["model_output"] = output.repeat(1, 1, scheduler.n_grid)
    step = getattr(scheduler, "step", None) or scheduler.step_pred
    result = step(**{key: known[key] for key in inspect.signature(step).parameters if key in known})
    after = result[0] if isinstance(result, tuple) else result.prev_sample
    return torch.nan_to_num(after.float()).clamp(-10, 10)


def is_set(scheduler: Any, steps: int) -> bool:
    """Set the timesteps of a scheduler; False where its config serves no steps, or not so many."""
    try:
        scheduler.set_timesteps(steps)
        if is_stepped(scheduler):
            sample(lambda latents, t: latents, scheduler, scheduler.timesteps[:1])
            scheduler.set_timesteps(steps)
    except (ValueError, ArithmeticError, NotImplementedError):
        return False
    return True


def is_stepped(scheduler: Any) -> bool:
    """Whether forecasts need a scheduler's steps: of others the calls are counted, or they are refused."""
    return (
        type(scheduler).__name__ != STANDING and has_index(scheduler) and read_levels(scheduler).incompatibility is None
    )


@torch.no_grad()
def sample(model: Callable[[Tensor, Any], Tensor], scheduler: Any, timesteps: Any) -> None:
    """Sample with a loop as pipelines have it."""
    latents = torch.randn(1, 4, CHANNELS, generator=torch.Generator().manual_seed(0))
    for t in timesteps:
        scaled = hasattr(scheduler, "step") and hasattr(scheduler, "scale_model_input")
        output = model(scheduler.scale_model_input(latents, t) if scaled else latents, t)
        try:
            latents = step_of(scheduler, output, t, latents)
        # Some take tokens, or arguments of their own, or go with no such prediction_type.
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            if is_stepped(scheduler):
                raise


def full_steps(steps: int) -> tuple[int, ...]:
    """The full steps of a run."""
    return tuple(full for full in (0, 1, 5, 25) if 2 * full < steps)


def check_forecasts(predictor: Predictor, levels: tuple[float, ...], features: list[Tensor]) -> None:
    """Compare the features of a run with the predictor's formula over those of its full steps."""
    steps = len(features)
    for step, feature in enumerate(features):
        before = [full for full in full_steps(steps) if full <= step]
        expected = features[before[-1]].double()
        if isinstance(predictor, TaylorSeer) and len(before) > 1:
            old, new = before[-2:]
            slope = (features[new].double() - features[old].double()) / (levels[new] - levels[old])
            expected = expected + (levels[step] - levels[new]) * slope
        scale = float(features[before[-1]].abs().max())
        torch.testing.assert_close(feature.double(), expected, rtol=1e-3, atol=1e-3 * scale, equal_nan=True)


def check_run(model: Any, scheduler: Any, predictor: Predictor, levels: Levels) -> None:
    """Sample once: forecasts by the formula, or full steps and a warning that names the scheduler's class."""
    steps = len(levels.sigmas) - 1
    # Some list the end of the run too.
    listed = scheduler.timesteps[:steps] if levels.incompatibility is None else scheduler.timesteps[:4]
    with warnings.catch_warnings(record=True) as caught, watching(model) as watch:
        warnings.simplefilter("always")
        # Timesteps within [0, 1] are told as they are.
        unit = 1000 if max(map(float, scheduler.timesteps)) > 2 else 1
        sample(lambda latents, t: model(**call_arguments(latents, float(t) / unit)).sample, scheduler, listed)
    told = [str(each.message) for each in caught if issubclass(each.category, LesaWarning)]
    if levels.incompatibility is not None:
        assert type(scheduler).__name__ in levels.incompatibility
        assert len(told) == 1 and levels.incompatibility in told[0]
        assert watch.blocks == len(listed) * NUM_BLOCKS
        return
    assert told == [] and summary(model).refused is None
    assert all(later < earlier for earlier, later in itertools.pairwise(levels.sigmas))
    assert levels.sigmas[0] <= 1.001 and levels.sigmas[-1] >= 0
    assert levels.timesteps == tuple(map(float, listed))
    assert watch.blocks == len(full_steps(steps)) * NUM_BLOCKS
    check_forecasts(predictor, levels.sigmas, watch.features)


def schedule(sigmas: Any) -> Schedule:
    """The rule of these tests."""
    return Schedule.explicit(len(sigmas) - 1, full_steps(len(sigmas) - 1))


@pytest.mark.parametrize("counts", COUNTS, ids=["few", "many"])
@pytest.mark.parametrize("name", CLASSES)
def test_every_scheduler_is_forecast_by_the_formula_or_refused_by_name(name: str, counts: tuple[int, ...]) -> None:
    model, reasons = tiny_transformer(), []
    for config in configs(name):
        try:
            scheduler = getattr(diffusers, name)(**config)
        except ImportError as error:
            pytest.skip(str(error).strip())
        # Not every option goes with every other one.
        except (ValueError, NotImplementedError):
            continue
        for steps in counts:
            if not is_set(scheduler, steps):
                continue
            levels = read_levels(scheduler)
            # They take turns, as 50 steps of each would cost twice the time.
            predictor = PREDICTORS[len(reasons) % 2]
            enable(model, predictor, schedule, scheduler=scheduler)
            check_run(model, scheduler, predictor, levels)
            reasons.append(levels.incompatibility)
    if not reasons:
        pytest.skip(f"{name} takes other numbers of steps than {counts}")
    if name in SECOND_ORDER:
        assert all(reason is not None and "order 2" in reason for reason in reasons)


def test_a_scheduler_whose_index_stands_still_costs_forecasts_alone() -> None:
    model, scheduler = tiny_transformer(), getattr(diffusers, STANDING)(stages=1)
    enable(model, Reuse(), schedule, scheduler=scheduler)
    scheduler.set_timesteps(10)
    with watching(model) as watch, pytest.warns(LesaWarning, match="does it call scheduler.step"):
        sample(
            lambda latents, t: model(**call_arguments(latents, float(t) / 1000)).sample, scheduler, scheduler.timesteps
        )
    assert watch.blocks == len(scheduler.timesteps) * NUM_BLOCKS


def test_the_list_of_schedulers_holds_those_that_the_rules_are_for() -> None:
    assert len(CLASSES) > 40
    assert {"DDIMScheduler", "EDMEulerScheduler", "UniPCMultistepScheduler"} <= {*CLASSES}
    assert len(SECOND_ORDER) == 4


def cosmos() -> Any:
    """The scheduler of Cosmos-Predict2, as its pipeline sets it up."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(sigmas=np.linspace(0, 1, 10))
    scheduler.sigmas[-1] = scheduler.sigmas[-2]
    return scheduler


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.EDMEulerScheduler(),
        diffusers.EDMDPMSolverMultistepScheduler(final_sigmas_type="sigma_min"),
        diffusers.CMStochasticIterativeScheduler(),
        diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction"),
        cosmos(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_sigmas_that_span_orders_of_magnitude_are_levels_as_the_network_sees_them(scheduler: Any) -> None:
    if not isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.double()
    assert sigmas[0] > 10
    levels = read_levels(scheduler)
    assert levels.incompatibility is None
    torch.testing.assert_close(torch.tensor(levels.sigmas[:-1]).double(), (sigmas / (1 + sigmas))[:-1])
    assert levels.sigmas[-1] == 0


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DEISMultistepScheduler", "SASolverScheduler", "LMSDiscreteScheduler"]
)
def test_schedulers_of_ddpm_are_placed_at_their_timesteps(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(10)
    expected = torch.cat([(torch.as_tensor(scheduler.timesteps).double() + 1) / 1000, torch.zeros(1).double()])
    torch.testing.assert_close(torch.tensor(read_levels(scheduler).sigmas).double(), expected)


def test_a_last_level_that_is_listed_twice_is_no_second_order_step() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(10)
    assert scheduler.sigmas[-1] == scheduler.sigmas[-2]
    levels = read_levels(scheduler)
    assert (levels.incompatibility, len(levels.sigmas), levels.sigmas[-1]) == (None, 11, 0.0)


def test_inverted_sigmas_are_levels_that_fall() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(10)
    levels = read_levels(scheduler)
    assert levels.sigmas[0] > 0.99 and levels.sigmas[-1] == 0 and levels.incompatibility is None

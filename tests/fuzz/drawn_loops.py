"""Which sampling loops there are, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
from hypothesis import strategies as st

from lesa_kernels import Schedule

Draw = Callable[[st.SearchStrategy[Any]], Any]

PLACES = ("broken off", "callback", "after", "threads", "uneven threads")
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def _sigmas(scheduler: Any) -> list[float]:
    levels: list[float] = scheduler.sigmas.double().tolist()
    return levels


def _timesteps(scheduler: Any) -> list[float]:
    return [(float(t) + 1) / 1000 for t in scheduler.timesteps] + [0.0]


def _bounded(scheduler: Any) -> list[float]:
    return [sigma / (1 + sigma) for sigma in _sigmas(scheduler)]


# Name -> how a scheduler is made, and what its levels are.
SCHEDULERS: dict[str, tuple[Callable[[], Any], Callable[[Any], list[float]]]] = {
    "euler flow": (diffusers.FlowMatchEulerDiscreteScheduler, _sigmas),
    "shifted euler flow": (lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), _sigmas),
    "lcm flow": (diffusers.FlowMatchLCMScheduler, _sigmas),
    "unipc flow": (lambda: diffusers.UniPCMultistepScheduler(**_FLOW, final_sigmas_type="sigma_min"), _sigmas),
    "dpm flow": (lambda: diffusers.DPMSolverMultistepScheduler(**_FLOW), _sigmas),
    "ddim": (diffusers.DDIMScheduler, _timesteps),
    "lcm": (diffusers.LCMScheduler, _timesteps),
    "euler": (diffusers.EulerDiscreteScheduler, _timesteps),
    "deis": (diffusers.DEISMultistepScheduler, _timesteps),
    "edm": (diffusers.EDMEulerScheduler, _bounded),
}
FLOWS = tuple(name for name, (_, levels) in SCHEDULERS.items() if levels is _sigmas)
EVENTS = ("prompt", "prompt in place", "guidance", "guidance in place", "sigmas in place", "sigmas replaced")


@dataclass(frozen=True)
class Other:
    """Another run on the same transformer, of a second pipeline but for "broken off".

    Args:
        place: "broken off": the first run ends after a step, and the same pipeline runs again; "callback": a second one
            runs whole after a step of the first; "after": the first is broken off there, the second runs whole, and the
            first runs again; "threads": both run from the beginning, a call each by turns; "uneven threads": by turns
            that are drawn.
        step: of the first run; the seed of what is drawn.
        steps: its own.
        scheduler: its own.
        same_prompt: whether both have the same tensors as prompt.
        enabled: whether it is enabled too, after the first.
    """

    place: str
    step: int
    steps: int
    scheduler: str
    same_prompt: bool = False
    enabled: bool = False


@dataclass(frozen=True)
class Loop:
    """A sampling loop.

    Args:
        steps: S of the scheduler.
        full: the schedule's full steps.
        scheduler: one of `SCHEDULERS`.
        predictor: "taylor" or "reuse".
        enabled_by: "pipeline", "scheduler" or "sigmas": what is given to `enable`.
        is_called: whether the loop runs within the pipeline's own call, else it is a user's.
        start: the first step.
        is_told: whether the scheduler is told the first step (or the pipeline how many are left).
        stop: where the loop ends.
        branches: "one", "named", "unnamed" (two calls outside of any context) or "batched" (two halves of one call).
        uncond_first: whether the unconditional call comes first.
        swapped: the step from which on the calls come in the other order.
        guided: the steps that have an unconditional call.
        held: whether prompts are the same tensors in all steps, else they are made anew for each call.
        event: what a callback changes, and before which step.
        batch: images, and from which step on how many others.
        residuals: whether each call comes with new residuals, as of a ControlNet.
        writes: whether a hook on `norm_out` writes into its argument.
        options: of `enable`.
        other: another run.
    """

    steps: int = 8
    full: tuple[int, ...] = (0, 1, 4)
    scheduler: str = "euler flow"
    predictor: str = "taylor"
    enabled_by: str = "pipeline"
    is_called: bool = True
    start: int = 0
    is_told: bool = True
    stop: int = 8
    branches: str = "one"
    uncond_first: bool = False
    swapped: int | None = None
    guided: tuple[int, int] = (0, 8)
    held: bool = True
    event: tuple[str, int] | None = None
    batch: tuple[int, int, int] = (1, 1, 0)
    residuals: bool = False
    writes: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    other: Other | None = None


def keeps_forecasts(loop: Loop) -> bool:
    """Whether a loop has nothing that may cost it more than a new history."""
    if loop.writes or (loop.other is not None and loop.other.place != "broken off"):
        return False
    one_name = loop.branches in ("one", "named")
    if loop.enabled_by == "sigmas":
        return one_name and loop.start == 0 and loop.other is None
    return one_name or (loop.swapped is None and (loop.held or loop.guided == (0, loop.steps)))


def schedule_of(loop: Loop) -> Callable[[Any], Schedule]:
    """The rule of all pipelines of a loop."""

    def schedule(sigmas: Any) -> Schedule:
        steps = len(sigmas) - 1
        return Schedule.explicit(steps, [full for full in loop.full if full < steps])

    return schedule


@st.composite
def loops(draw: Draw, place: str | None = None) -> Loop:
    """Loops; with `place` they have a second pipeline there."""
    steps = draw(st.integers(2, 10))
    full = (0, *sorted(draw(st.sets(st.integers(1, steps - 1), max_size=4))))
    start = draw(st.sampled_from([0, 0, 0, *range(1, steps)]))
    stop = draw(st.sampled_from([steps, steps, steps, *range(start + 1, steps)]))
    inside = st.integers(start, stop - 1)
    scheduler = draw(st.sampled_from([*FLOWS[:2], *SCHEDULERS]))
    enabled_by = draw(st.sampled_from(["pipeline", "pipeline", "scheduler"] + ["sigmas"] * (scheduler in FLOWS)))
    guided = draw(st.sampled_from([(0, steps), (0, draw(inside)), (draw(inside), steps)]))
    held = draw(st.sampled_from([True, True, False]))
    # Tensors that are made anew in each step tell nothing of what they hold, nor given sigmas of those in use.
    events = (EVENTS[:4] if held else ()) + (EVENTS[4:] if scheduler in FLOWS and enabled_by != "sigmas" else ())
    other = None
    if place is not None:
        other = Other(
            place,
            draw(inside),
            draw(st.sampled_from([steps, steps + 1, 2, 5])),
            draw(st.sampled_from([scheduler, *SCHEDULERS])),
            draw(st.booleans()),
            place != "broken off" and draw(st.booleans()),
        )
    return Loop(
        steps=steps,
        full=full,
        scheduler=scheduler,
        predictor=draw(st.sampled_from(["taylor", "reuse"])),
        enabled_by=enabled_by,
        is_called=draw(st.booleans()),
        start=start,
        is_told=draw(st.booleans()),
        stop=stop,
        branches=draw(st.sampled_from(["one", "named", "unnamed", "batched"])),
        uncond_first=draw(st.booleans()),
        swapped=draw(st.sampled_from([None, None, draw(inside)])),
        guided=guided,
        held=held,
        event=(draw(st.sampled_from(events)), draw(inside)) if events and draw(st.booleans()) else None,
        batch=draw(st.sampled_from([(1, 1, 0), (1, 1, 0), (1, 2, draw(inside)), (2, 1, draw(inside))])),
        residuals=draw(st.sampled_from([False, False, False, True])),
        writes=draw(st.sampled_from([False, False, False, True])),
        options=draw(st.sampled_from([(), (), (("chunk", 1),), (("check_every", 1),)])),
        other=other,
    )

"""Sampling loops of any kind around a tiny FLUX, and what may come of each call when the model is enabled.

The judgement knows nothing of the package's state: it keeps what came to `norm_out` in each call, and by the loop's own
step, branch and conditions says which features a forecast may be made of. A full call must be the plain model's.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from drawn_loops import SCHEDULERS, Loop, keeps_forecasts, schedule_of
from tiny_flux import CHANNELS, WIDTH, call_arguments, tiny_transformer
from torch import Tensor

from lesa_kernels import Reuse, TaylorSeer
from lesa_kernels.integrations import LesaWarning, disable, enable, summary

_TOKENS = 4
_PREDICTORS = {"reuse": Reuse(), "taylor": TaylorSeer(order=1, variable="sigma")}
# Of features around 1; wrong histories are off by more than a tenth.
_TOLERANCE = 2e-3


@dataclass
class Call:
    """A call of the enabled model, as the loop sees it."""

    run: Run
    branch: str
    step: int
    level: float
    conditions: tuple[Any, ...]
    is_full: bool
    feature: Tensor


@dataclass
class Record:
    """What came of a loop."""

    calls: list[Call] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Pipeline:
    """What `enable` looks at, and whose call it is that a call of the model comes from."""

    def __init__(self, transformer: FluxTransformer2DModel, scheduler: Any) -> None:
        self.transformer = transformer
        self.scheduler = scheduler

    def __call__(self, passes: Iterator[None]) -> bool:
        """Go on to the next call of the model; return whether there is one."""
        return next(passes, False) is None


@lru_cache(1)
def models() -> tuple[FluxTransformer2DModel, FluxTransformer2DModel]:
    """The model that is enabled, and one of the same weights that never is."""
    return tiny_transformer(), tiny_transformer()


class Watched:
    """A call's feature, and whether the blocks ran; `writes` adds the user's hook that writes in place."""

    def __init__(self, model: FluxTransformer2DModel, writes: bool) -> None:
        self.feature: Tensor | None = None
        self.is_full = False
        self.handles = [
            model.transformer_blocks[0].register_forward_hook(self._ran),
            model.norm_out.register_forward_pre_hook(self._keep),
        ]
        if writes:
            self.handles.append(model.norm_out.register_forward_pre_hook(self._write))

    def _write(self, _: Any, arguments: tuple[Any, ...]) -> None:
        arguments[0].mul_(-0.5)

    def _ran(self, *_: Any) -> None:
        self.is_full = True

    def _keep(self, _: Any, arguments: tuple[Any, ...]) -> None:
        self.feature = arguments[0].clone()

    def take(self) -> tuple[Tensor, bool]:
        """Return what the latest call was, and forget it."""
        assert self.feature is not None
        taken = self.feature, self.is_full
        self.feature, self.is_full = None, False
        return taken

    def remove(self) -> None:
        """Leave the model."""
        for handle in self.handles:
            handle.remove()


class Run:
    """One pass of a pipeline through its schedule.

    `passes` yields before each call of the model, so that others can come between.
    """

    def __init__(self, name: str, loop: Loop, pipeline: Pipeline, prompts: dict[str, int], played: Played) -> None:
        self.name, self.loop, self.pipeline, self.played = name, loop, pipeline, played
        self.prompts = dict(prompts)
        self.kept: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.guidance, self.versions = 3.5, [0, 0]  # of guidance and sigmas
        self.latents = torch.Generator().manual_seed(sum(map(ord, name)))

    def passes(self) -> Iterator[None]:
        """Sample."""
        loop, scheduler = self.loop, self.pipeline.scheduler
        scheduler.set_timesteps(loop.steps)
        if loop.is_told and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(loop.start)
        self.pipeline._num_timesteps = loop.steps - loop.start if loop.is_told else None
        latents = torch.randn(loop.batch[0], _TOKENS, CHANNELS, generator=self.latents)
        for step in range(loop.start, loop.stop):
            if loop.event is not None and loop.event[1] == step:
                self.change(loop.event[0])
            if loop.batch[1] != loop.batch[0] and loop.batch[2] == step:
                latents = latents[:1].repeat(loop.batch[1], 1, 1)
            t = scheduler.timesteps[step]
            told = scheduler.scale_model_input(latents, t) if hasattr(scheduler, "scale_model_input") else latents
            outputs: dict[str, Tensor] = {}
            for branch in self.branches(step):
                yield
                outputs |= self.call(branch, step, float(t) / 1000, told)
            velocity = outputs["cond"]
            if "uncond" in outputs:
                velocity = outputs["uncond"] + 2.0 * (velocity - outputs["uncond"])
            after = scheduler.step(velocity, t, latents, return_dict=False)[0].float()
            latents = torch.nan_to_num(after).clamp(-4, 4)
            yield from self.played.after(self, step)

    def go_on(self, passes: Iterator[None]) -> bool:
        """Go on to the next call of the model, within the pipeline's own call or without; return whether there is one.

        The call that was due is made now.
        """
        with torch.no_grad():
            return self.pipeline(passes) if self.loop.is_called else next(passes, False) is None

    def branches(self, step: int) -> list[str]:
        """The calls of a step, in order."""
        loop = self.loop
        if loop.branches == "one" or not loop.guided[0] <= step < loop.guided[1]:
            return ["cond"]
        if loop.branches == "batched":
            return ["both"]
        order = ["uncond", "cond"] if loop.uncond_first else ["cond", "uncond"]
        return order[::-1] if loop.swapped is not None and step >= loop.swapped else order

    def change(self, event: str) -> None:
        """Do what a callback does."""
        if event == "prompt":
            self.prompts["cond"] += 10
        elif event == "prompt in place":
            self.prompts["cond"] += 10
            for key, arguments in self.kept.items():
                if key[0] != "uncond":
                    fresh = self.arguments(key[0], key[1], anew=True)
                    for name in ("encoder_hidden_states", "pooled_projections"):
                        arguments[name].copy_(fresh[name])
            self.kept = {(key[0], key[1], *self.state(key[0])): each for key, each in self.kept.items()}
        elif event.startswith("guidance"):
            self.guidance, self.versions[0] = 1.0, 1
            if event == "guidance in place":
                for arguments in self.kept.values():
                    arguments["guidance"].fill_(1.0)
                self.kept = {(key[0], key[1], *self.state(key[0])): each for key, each in self.kept.items()}
        elif event == "sigmas in place":
            self.versions[1] = 1
            self.pipeline.scheduler.sigmas.mul_(0.9)
        else:
            self.versions[1] = 1
            self.pipeline.scheduler.sigmas = self.pipeline.scheduler.sigmas * 0.9

    def state(self, branch: str) -> tuple[Any, ...]:
        """What the tensors of a branch were made for."""
        prompts = tuple(self.prompts[name] for name in (("uncond", "cond") if branch == "both" else (branch,)))
        return prompts, self.versions[0]

    def arguments(self, branch: str, batch: int, anew: bool = False) -> dict[str, Any]:
        """The arguments of a call beside latents and timestep."""
        key = (branch, batch, *self.state(branch))
        if anew or key not in self.kept:
            halves = ("uncond", "cond") if branch == "both" else (branch,)
            made = [call_arguments(torch.zeros(batch, _TOKENS, CHANNELS), 0.5, self.prompts[each]) for each in halves]
            arguments = made[0] | {
                name: torch.cat([each[name] for each in made])
                for name in ("encoder_hidden_states", "pooled_projections", "guidance")
            }
            arguments["guidance"].fill_(self.guidance)
            del arguments["hidden_states"], arguments["timestep"]
            if anew:
                return arguments
            self.kept[key] = arguments
        return self.kept[key]

    def call(self, branch: str, step: int, told: float, latents: Tensor) -> dict[str, Tensor]:
        """Call the model, and judge what it did."""
        loop, model = self.loop, self.pipeline.transformer
        arguments = self.arguments(branch, len(latents), anew=not loop.held)
        if branch == "both":
            latents = torch.cat([latents, latents])
        if loop.residuals:
            arguments = arguments | {"controlnet_block_samples": [torch.randn(len(latents), _TOKENS, WIDTH)]}
        given = arguments | {"hidden_states": latents, "timestep": torch.full((len(latents),), told)}
        with model.cache_context(branch) if loop.branches == "named" else nullcontext():
            output = model(**given, return_dict=False)[0]
        feature, is_full = self.played.watched[0].take()
        level = SCHEDULERS[loop.scheduler][1](self.pipeline.scheduler)[step]
        conditions = (*self.state(branch), self.versions[1], len(latents))
        call = Call(self, branch, step, level, conditions, is_full, feature)
        self.played.judge(call, given, output)
        if branch != "both":
            return {branch: output}
        uncond, cond = output.chunk(2)
        return {"uncond": uncond, "cond": cond}


class Played:
    """A loop that is played on the enabled model, and its record."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.record = Record()
        self.model, self.plain = models()
        self.first = Pipeline(self.model, SCHEDULERS[loop.scheduler][0]())
        self.second = Pipeline(self.model, None)
        self.watched: tuple[Watched, Watched]
        self.caught: list[warnings.WarningMessage] = []
        self._target: Any = self.first if loop.enabled_by == "pipeline" else self.model

    def play(self) -> Record:
        """Enable the model as the loop says, play, and undo all of it."""
        loop, model = self.loop, self.model
        predictor, schedule = _PREDICTORS[loop.predictor], schedule_of(loop)
        options: dict[str, Any] = dict(loop.options)
        if loop.enabled_by == "scheduler":
            options["scheduler"] = self.first.scheduler
        elif loop.enabled_by == "sigmas":
            probe = SCHEDULERS[loop.scheduler][0]()
            probe.set_timesteps(loop.steps)
            options["sigmas"] = [*SCHEDULERS[loop.scheduler][1](probe)[:-1], 0.0]
        torch.manual_seed(0)
        with ExitStack() as stack, warnings.catch_warnings(record=True) as self.caught:
            warnings.simplefilter("always")
            disable(model)
            enable(self._target, predictor, schedule, **options)
            stack.callback(disable, model)
            if loop.other is not None:
                self.second.scheduler = SCHEDULERS[loop.other.scheduler][0]()
                if loop.other.enabled:
                    enable(self.second, predictor, schedule)
            self.watched = Watched(model, loop.writes), Watched(self.plain, loop.writes)
            stack.callback(self.watched[0].remove)
            stack.callback(self.watched[1].remove)
            self._runs()
        return self.record

    def _runs(self) -> None:
        """Let the pipelines run."""
        loop, other = self.loop, self.loop.other
        first = Run("first", loop, self.first, {"cond": 1, "uncond": 2}, self)
        if other is None or other.place == "callback":
            self._drive(first)
        elif other.place in ("after", "broken off"):
            passes = first.passes()
            while first.go_on(passes) and not (self.record.calls and self.record.calls[-1].step >= other.step):
                pass
            passes.close()
            if other.place == "after":
                self._drive(self._second())
            first = Run("again", loop, self.first, {"cond": 1, "uncond": 2}, self)
            self._drive(first)
        else:
            self._in_threads(first, self._second())
        self.explain(first)

    def after(self, run: Run, step: int) -> Iterator[None]:
        """The callback at the end of a step."""
        other = self.loop.other
        if other is not None and other.place == "callback" and run.name == "first" and other.step == step:
            second = self._second()
            passes = second.passes()
            while second.go_on(passes):
                yield

    def _second(self) -> Run:
        """A run of the second pipeline."""
        other = self.loop.other
        assert other is not None
        loop = Loop(
            other.steps,
            scheduler=other.scheduler,
            stop=other.steps,
            held=self.loop.held,
            is_called=self.loop.is_called,
        )
        prompts = {"cond": 1 if other.same_prompt else 5, "uncond": 6}
        return Run("second", loop, self.second, prompts, self)

    def _drive(self, run: Run) -> None:
        """Run to the end in this thread."""
        passes = run.passes()
        while run.go_on(passes):
            pass

    def _in_threads(self, *runs: Run) -> None:
        """Run in a thread each, one call at a time."""
        other = self.loop.other
        assert other is not None
        turns = torch.Generator().manual_seed(other.step)
        alive = [(run, run.passes(), ThreadPoolExecutor(1)) for run in runs]
        for turn in itertools.count(1):
            if not alive:
                break
            place = turn % len(alive)
            if other.place == "uneven threads":
                place = int(torch.randint(len(alive), (1,), generator=turns))
            if turn == 1 and not self.loop.is_called:
                # Nothing tells whose the first call of all is, but the pipeline that makes it.
                place = int(other.enabled)
            run, passes, thread = alive[place]
            if not thread.submit(run.go_on, passes).result():
                thread.shutdown()
                del alive[place]

    def judge(self, call: Call, given: dict[str, Any], output: Tensor) -> None:
        """Compare a call with the plain model, or with the formula."""
        earlier = [each for each in self.record.calls if each.run is call.run and each.branch == call.branch]
        self.record.calls.append(call)
        where = f"{call.run.name} run, step {call.step}, {call.branch}"
        if call.is_full:
            with torch.no_grad():
                expected = self.plain(**given, return_dict=False)[0]
            feature, _ = self.watched[1].take()
            if not (_close(call.feature, feature) and _close(output, expected)):
                self.record.problems.append(f"{where}: a full call that is not the plain model's")
            return
        own: list[Call] = []
        for each in reversed(earlier):
            if each.conditions != call.conditions:
                break
            own += [each] if each.is_full else []
        if not own:
            self.record.problems.append(f"{where}: a forecast without a full call of its own before it")
        elif not any(_close(call.feature, expected) for expected in self._forecasts(call, own)):
            self.record.problems.append(f"{where}: a forecast that is not the formula's{self._found(call)}")
        elif not _close(output, self._tail(call.feature, given)):
            self.record.problems.append(f"{where}: an output that does not follow from the forecast")

    def _forecasts(self, call: Call, own: list[Call]) -> list[Tensor]:
        """What the formula may give, from the full calls of the branch, newest first."""
        new = own[0].feature
        if self.loop.predictor == "reuse" or len(own) == 1:
            return [new]
        slope = (new.double() - own[1].feature.double()) / (own[0].level - own[1].level)
        forecasts = [(new.double() + (call.level - own[0].level) * slope).float()]
        # A history that began anew at the newest full call, which the summary must tell.
        return [*forecasts, new] if self._restarts() else forecasts

    def _restarts(self) -> tuple[Any, ...]:
        """What the summary tells of histories that began anew."""
        restarts: tuple[Any, ...] = getattr(summary(self._target), "restarts", ())
        return restarts

    def _found(self, call: Call) -> str:
        """Say which other call a wrong forecast looks like."""
        alike = [each for each in self.record.calls if each is not call and _close(each.feature, call.feature)]
        return f" but the feature of {alike[0].run.name}, step {alike[0].step}, {alike[0].branch}" if alike else ""

    def _tail(self, feature: Tensor, given: dict[str, Any]) -> Tensor:
        """What follows the blocks, from the model's parts."""
        plain, feature = self.plain, feature.clone()  # hooks write
        with torch.no_grad():
            embedding = plain.time_text_embed(
                given["timestep"] * 1000, given["guidance"] * 1000, given["pooled_projections"]
            )
            output: Tensor = plain.proj_out(plain.norm_out(feature, embedding))
        self.watched[1].take()
        return output

    def explain(self, run: Run) -> None:
        """Compare a run's full calls with those of the schedule; others must be explained."""
        found = summary(self._target)
        reasons = [found.refused] if found.refused is not None else []
        reasons += [str(each) for each in self._restarts()]
        if self.loop.other is not None and self.loop.other.place != "broken off":
            reasons += [str(each.message) for each in self.caught if issubclass(each.category, LesaWarning)]
        turns = {*self.loop.guided, self.loop.batch[2], *(self.loop.event or ())[1:]}
        for branch in dict.fromkeys(call.branch for call in self.record.calls):
            calls = [call for call in self.record.calls if call.run is run and call.branch == branch]
            lost = [
                call.step
                for before, call in itertools.pairwise(calls)
                if call.is_full and call.step not in self.loop.full and before.conditions == call.conditions
            ]
            if lost and not reasons:
                self.record.problems.append(f"{run.name} run, {branch}: full at {lost} without a reason")
            elif any(step not in turns for step in lost) and keeps_forecasts(self.loop):
                self.record.problems.append(f"{run.name} run, {branch}: full at {lost}: {reasons}")


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(
        torch.allclose(one, other, rtol=0, atol=_TOLERANCE * max(1.0, float(other.abs().max())))
    )


COUNTS: Counter[str] = Counter()


def problems_of(loop: Loop) -> list[str]:
    """Play a loop, count what became of it, and return what came out otherwise than it may."""
    played = Played(loop)
    record = played.play()
    COUNTS["loops"] += 1
    for call in record.calls:
        COUNTS["calls full" if call.is_full else "calls forecast"] += 1
    COUNTS["loops with a warning"] += any(issubclass(each.category, LesaWarning) for each in played.caught)
    return record.problems

"""Fits through the tail of models with guidance: each branch has coefficients of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lesa_kernels as lesa
from lesa_kernels.guidance import Guidance
from lesa_kernels.training import Evaluator, fit
from lesa_kernels.training.plan_policy import PlanPolicy
from lesa_kernels.training.progress import progress_bar
from lesa_kernels.training.references import Reference, reference_run
from lesa_kernels.training.tail_fit import BranchCoefficients, ClosedLoopRuns, segments
from lesa_kernels.trajectories import LoopSource, ModelCall, StepPolicy

STEPS, RUNS, WIDTH = 12, 4, 8
SIGMAS = [1 - (step / STEPS) ** 1.3 for step in range(STEPS)] + [0.0]
SCHEDULE = lesa.Schedule.explicit(STEPS, (0, 3, 6, 9))
LINEAR = Guidance(3.0)
RULES = [LINEAR, Guidance(3.0, "rescale", 0.7), Guidance(3.0, "norm")]
every_rule = pytest.mark.parametrize("guidance", RULES, ids=str)
either_way = pytest.mark.parametrize("is_batched", [False, True], ids=["separate calls", "one call"])


class Flow:
    """Runs of a velocity field that depends on a condition, by guidance; `sign` is that of the model's output."""

    def __init__(
        self,
        guidance: Guidance = LINEAR,
        is_batched: bool = False,
        *,
        seed: int = 0,
        sign: float = 1.0,
        names: tuple[str, str] = ("cond", "uncond"),
        step_length: float = 1.0,
    ) -> None:
        generator = torch.Generator().manual_seed(5)
        self.inner = torch.randn(WIDTH, WIDTH, generator=generator) / 2
        self.out = torch.randn(WIDTH, WIDTH, generator=generator) / 3
        self.noise = torch.randn(RUNS, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
        self.guidance, self.is_batched, self.sign, self.names = guidance, is_batched, sign, names
        self.step_length = step_length

    def source(self) -> LoopSource:
        return LoopSource(self.loop, RUNS, SIGMAS)

    def loop(self, runs: Sequence[int], policy: StepPolicy) -> None:
        latents = self.noise[list(runs)]
        for step in range(STEPS):
            cond, uncond = self.outputs(latents, step, policy)
            velocity = self.sign * self.guidance.combine(uncond, cond)
            latents = latents + self.step_length * (SIGMAS[step + 1] - SIGMAS[step]) * velocity

    def outputs(self, latents: Tensor, step: int, policy: StepPolicy) -> list[Tensor]:
        """Return the outputs of cond and uncond."""
        conditions = torch.tensor([0.7, 0.0])
        if self.is_batched:
            both = torch.cat([latents, latents])
            shift = conditions.flip(0).repeat_interleave(len(latents))[:, None, None]
            output = policy(self.call(both, shift, step, "cond"))
            assert output is not None
            return list(output.chunk(2))[::-1]
        made = [
            policy(self.call(latents, condition, step, name))
            for condition, name in zip(conditions, self.names, strict=True)
        ]
        assert made[0] is not None and made[1] is not None
        return [each for each in made if each is not None]

    def call(self, latents: Tensor, condition: Tensor, step: int, name: str) -> ModelCall:
        def blocks() -> Tensor:
            return torch.tanh(latents @ self.inner + condition + torch.sin(torch.tensor(3.0 * SIGMAS[step])))

        def tail(feature: Tensor) -> Tensor:
            normed = torch.nn.functional.layer_norm(feature, (WIDTH,))
            return self.sign * (normed @ self.out * (1 + SIGMAS[step]) + condition * feature - feature)

        return ModelCall(step, blocks, tail, latents, name)


def error_of(predictor: lesa.Predictor | dict[str, lesa.LinearPredictor], flow: Flow) -> float:
    source, predictors = flow.source(), predictor
    if isinstance(predictors, lesa.Predictor):
        predictors = dict.fromkeys(("uncond", "cond"), predictors)  # type: ignore[arg-type]
    reference = reference_run(source, range(RUNS), [STEPS])
    policy = PlanPolicy({name: each.plan(SIGMAS, SCHEDULE) for name, each in predictors.items()}, reference)
    source.run(range(RUNS), policy)
    assert policy.final is not None
    wanted = reference.latents[STEPS]
    return ((policy.final - wanted).norm() / wanted.norm()).item()


def fitted(flow: Flow, batch: int = RUNS) -> dict[str, lesa.LinearPredictor]:
    found = fit(flow.source(), SCHEDULE, rounds=6, batch=batch, progress=False)
    assert isinstance(found, dict)
    return found


@every_rule
@either_way
def test_the_reference_shows_the_guidance(guidance: Guidance, is_batched: bool) -> None:
    flow = Flow(guidance, is_batched, sign=-1.0)
    reference = reference_run(flow.source(), range(RUNS), [0, STEPS])
    assert reference.branches.sign == -1.0 and reference.branches.names == ("uncond", "cond")
    assert reference.branches.is_batched == is_batched
    assert list(reference.guidance) == list(range(STEPS))
    for found in reference.guidance.values():
        assert found.rule == guidance.rule and found.scale == pytest.approx(guidance.scale, rel=1e-2)
        assert found.rescale == pytest.approx(guidance.rescale, abs=1e-2)
    assert torch.equal(reference.latents[0], flow.noise)
    latents: list[Tensor] = []
    flow.loop(range(RUNS), lambda call: (latents.append(call.latents), call.tail(call.blocks()))[1])  # type: ignore[arg-type, misc]
    assert reference.latents[STEPS].shape == flow.noise.shape
    assert torch.linalg.vector_norm(reference.latents[STEPS] - latents[-1][:RUNS]) > 0


@every_rule
@either_way
def test_derivatives_are_those_of_finite_differences(guidance: Guidance, is_batched: bool) -> None:
    flow = Flow(guidance, is_batched)
    segment = segments(SCHEDULE)[-1]
    start = {step: dict.fromkeys([full for full in SCHEDULE.full_steps if full < step][-2:], 0.5) for step in range(12)}
    coefficients: BranchCoefficients = {
        branch: {step: dict(start[step]) for each in segments(SCHEDULE) for step in each.steps}
        for branch in ("uncond", "cond")
    }
    with progress_bar(False) as bar:
        runs = ClosedLoopRuns(flow.source(), SCHEDULE, RUNS, bar)
    (reference,) = runs._references
    columns, _ = runs._derivatives(range(RUNS), reference, coefficients, segment)
    places = [
        (branch, step, full)
        for branch in reference.branches.names
        for step in segment.steps
        for full in coefficients[branch][step]
    ]
    assert len(columns) == len(places) == 8
    for column, (branch, step, full) in zip(columns, places, strict=True):
        moved = []
        for shift in (0.01, -0.01):
            coefficients[branch][step][full] = 0.5 + shift
            moved.append(runs._derivatives(range(RUNS), reference, coefficients, segment)[1])
        coefficients[branch][step][full] = 0.5
        assert column.norm() > 0.01
        torch.testing.assert_close(column, (moved[0] - moved[1]) / 0.02, rtol=2e-2, atol=3e-3)


@every_rule
def test_branches_have_coefficients_of_their_own(guidance: Guidance) -> None:
    separate, together = (fitted(Flow(guidance, is_batched)) for is_batched in (False, True))
    assert set(separate) == set(together) == {"cond", "uncond"}
    unseen = Flow(guidance, seed=1)
    assert error_of(separate, unseen) < 0.96 * error_of(lesa.TaylorSeer(2), unseen)
    steps = [step for step in range(STEPS) if step not in SCHEDULE.full_steps]
    for branch in ("cond", "uncond"):
        torch.testing.assert_close(
            separate[branch].coefficients, together[branch].coefficients, rtol=1e-2, atol=1e-2, equal_nan=True
        )
    apart = (separate["cond"].coefficients - separate["uncond"].coefficients)[steps]
    assert apart.abs().max() > 0.05


def test_the_evaluator_takes_a_predictor_of_each_branch() -> None:
    for is_batched in (False, True):
        flow = Flow(is_batched=is_batched)
        found = fitted(flow)
        score = Evaluator(flow.source(), batch=RUNS, progress=False)(found, SCHEDULE)
        policy_error = error_of(found, flow)
        assert score == pytest.approx(-20 * torch.tensor(policy_error).log10().item(), abs=1.0)
        with pytest.raises(
            ValueError, match=r"predictors must be of the branches \['cond', 'uncond'\], got \['cond'\]"
        ):
            Evaluator(flow.source(), progress=False)({"cond": lesa.Reuse()}, SCHEDULE)


def test_batches_do_not_change_a_guided_fit() -> None:
    whole, parts = (fitted(Flow(is_batched=True), batch) for batch in (RUNS, 3))
    for branch in whole:
        torch.testing.assert_close(
            whole[branch].coefficients, parts[branch].coefficients, rtol=1e-3, atol=1e-3, equal_nan=True
        )


def test_calls_without_names_are_told_apart_by_the_rule() -> None:
    norm = Guidance(3.0, "norm")
    reference = reference_run(Flow(norm, names=("cond", "cond 2")).source(), range(RUNS), [])
    assert reference.branches.names == ("cond 2", "cond")


def test_other_steps_than_guided_euler_s_are_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance that is linear, .* step 0 moved the latents elsewhere"):
        fit(Flow(Guidance(3.0, "norm"), step_length=0.5).source(), SCHEDULE, progress=False)


def _changed(change: str) -> LoopSource:
    """Return runs whose calls are not those of two branches."""
    flow = Flow(is_batched=change == "shape")

    def loop(runs: Sequence[int], policy: StepPolicy) -> None:
        def answer(call: ModelCall) -> Tensor | None:
            output = policy(replace(call, model=int(change == "model" and call.step == 2)))
            if change == "third":
                policy(replace(call, branch=f"{call.branch} 2"))
            if change == "twice":
                policy(call)
            if change == "name" and call.step == 2 and call.branch == "cond":
                policy(replace(call, branch="other"))
            if change == "shape" and call.step == 2:
                assert call.latents is not None
                half = call.latents.chunk(2)[0]
                policy(replace(call, step=3, latents=half))
            return output

        flow.loop(runs, answer)

    return LoopSource(loop, RUNS, SIGMAS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("third", "for two branches of guidance, got the calls"),
        ("twice", "or once for each branch, got 'cond' twice in step 0"),
        ("name", r"the same calls in every step, \['cond', 'uncond'\], got \['cond', 'other', 'uncond'\] in step 2"),
        ("model", "source must run one model, .* got a call of a second one at step 2"),
        ("shape", r"must keep the shape of its latents, got \(4, 5, 8\) after \(8, 5, 8\)"),
    ],
)
def test_calls_of_another_kind_are_refused(change: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(_changed(change), SCHEDULE, batch=RUNS, progress=False)


def test_tokens_of_a_condition_stay_and_count_for_nothing() -> None:
    flow, extra = Flow(), torch.ones(RUNS, 2, WIDTH)

    def longer(policy: StepPolicy) -> StepPolicy:
        def answer(call: ModelCall) -> Tensor | None:
            assert call.latents is not None and call.tail is not None
            latents, tail = torch.cat([call.latents, extra[: len(call.latents)]], 1), call.tail
            output = policy(replace(call, latents=latents, tail=lambda feature: torch.cat([tail(feature), extra], 1)))
            return None if output is None else output[:, :-2]

        return answer

    source = LoopSource(lambda runs, policy: flow.loop(runs, longer(policy)), RUNS, SIGMAS)
    reference = reference_run(source, range(RUNS))
    assert reference.moves is not None and reference.moves[:, :, 0].tolist() == [[True] * 5 + [False] * 2] * RUNS
    found, plain = fit(source, SCHEDULE, rounds=6, batch=RUNS, progress=False), fitted(flow)
    assert isinstance(found, dict)
    for branch in found:
        torch.testing.assert_close(found[branch].coefficients, plain[branch].coefficients, equal_nan=True)
    score, wanted = (
        Evaluator(each, batch=RUNS, progress=False)(lesa.TaylorSeer(1), SCHEDULE) for each in (source, flow.source())
    )
    assert score == pytest.approx(wanted, abs=1e-3)


def test_guidance_of_a_single_step_is_not_known() -> None:
    flow = Flow()

    def loop(runs: Sequence[int], policy: StepPolicy) -> None:
        flow.outputs(flow.noise, 0, policy)

    with pytest.raises(ValueError, match="must take at least 2 steps, which show its guidance"):
        reference_run(LoopSource(loop, RUNS, [1.0, 0.0]), range(RUNS), [1])


def test_plans_of_branches_have_the_same_full_steps() -> None:
    reference = reference_run(Flow().source(), range(RUNS), [])
    plans = {
        "cond": lesa.Reuse().plan(SIGMAS, SCHEDULE),
        "uncond": lesa.Reuse().plan(SIGMAS, lesa.Schedule.explicit(STEPS, (0, 5))),
    }
    with pytest.raises(ValueError, match=r"the same full steps for all branches, got .*\(0, 5\)"):
        PlanPolicy(plans, reference)
    with pytest.raises(ValueError, match=r"must make the calls \['cond'\] in each step, got 'uncond'"):
        Flow(names=("uncond", "cond")).source().run(range(RUNS), PlanPolicy(plans["cond"], Reference({})))

"""Combines the branches of classifier-free guidance as diffusers' pipelines do, and finds the rule that a run follows.

A run shows the velocity that its scheduler got, since an Euler step moves the latents by (sigma_next - sigma) times it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lesa_kernels.checks import check_float

Rule: TypeAlias = Literal["linear", "rescale", "norm"]

# Of the velocity: what pipelines compute in another order differs by less, other rules by more.
_TOLERANCE = 1e-3
# Roundings of the branches and of what is made of them. Latents are rounded twice at most, and over many elements that
# comes to less than the largest that a single rounding can be.
_ROUNDINGS = 4.0
# A rule with more to choose from must come nearer than this to be taken for the simpler one.
_NO_WORSE = 1.01


@dataclass(frozen=True)
class Guidance:
    """How a pipeline makes one velocity of its two branches.

    Args:
        scale: g of uncond + g (cond - uncond), whatever the rule.
        rule: "linear": that is all. "rescale": then the part `rescale` of it gets the standard deviation of each cond
            (arXiv 2305.08891). "norm": then each vector along the last dimension gets the norm of cond's (Qwen-Image,
            Lumina 2).
        rescale: of the rule "rescale", 0 to 1.

    Raises:
        ValueError: when the rule is none of these, or a number is not finite or out of range.
    """

    scale: float
    rule: Rule = "linear"
    rescale: float = 0.0

    def __post_init__(self) -> None:
        if self.rule not in get_args(Rule):
            raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, got {self.rule!r}")
        check_float("scale", self.scale)
        if not 0 <= check_float("rescale", self.rescale) <= 1:
            raise ValueError(f"rescale must be 0 to 1, got {self.rescale}")

    def combine(self, uncond: Tensor, cond: Tensor) -> Tensor:
        """Return the guided velocity.

        Args:
            uncond: [B, ...], floating point.
            cond: like uncond.

        Returns:
            Like uncond. Equal branches give themselves, by every rule.
        """
        guided = uncond + self.scale * (cond - uncond)
        if self.rule == "rescale":
            return guided * (self.rescale * _ratio(_deviation, cond, guided) + (1 - self.rescale))
        return guided * _ratio(_length, cond, guided) if self.rule == "norm" else guided

    def __str__(self) -> str:
        rule = f"rescale {self.rescale:.3g}" if self.rule == "rescale" else self.rule
        return f"scale {self.scale:.4g}, rule {rule}"


def estimate_scale(uncond: Tensor, cond: Tensor, velocity: Tensor, rule: Rule) -> float:
    """Return the scale that comes nearest to a velocity under a rule; waits for the device.

    Rounding of single elements averages out in it.

    Args:
        uncond: [B, ...].
        cond: like uncond.
        velocity: like uncond: what the scheduler got.
        rule: of the guidance.
    """
    base, change, aim = uncond.float(), cond.float() - uncond.float(), velocity.float()
    if rule == "linear":
        aim = aim - base
    else:
        # The rule keeps the direction of the sum, of each sample or of each vector, and not its length.
        dims = _dims(aim) if rule == "rescale" else (-1,)
        squares = aim.square().sum(dims, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        base = base - aim * ((base * aim).sum(dims, keepdim=True) / squares)
        change = change - aim * ((change * aim).sum(dims, keepdim=True) / squares)
        aim = -base
    # In float64: sums over millions of elements.
    products = torch.stack([(aim * change).sum(dtype=torch.float64), change.square().sum(dtype=torch.float64)])
    product, square = products.tolist()
    return float(product / square) if square > 0 else 1.0


def find_guidance(uncond: Tensor, cond: Tensor, velocity: Tensor, noise: float = 0.0) -> Guidance | None:
    """Find the rule and the scale by which two branches became a velocity; waits for the device.

    Args:
        uncond: [B, ...].
        cond: like uncond.
        velocity: like uncond: what the scheduler got.
        noise: norm of what rounding may have done to the velocity, see `rounding_noise`.

    Returns:
        The rule that gives the velocity, None where none does to within rounding.
    """
    uncond, cond, velocity = uncond.float(), cond.float(), velocity.float()
    errors: dict[Guidance, float] = {}
    for rule in get_args(Rule):
        guidance = Guidance(estimate_scale(uncond, cond, velocity, rule), rule)
        if rule == "rescale":
            guided = Guidance(guidance.scale).combine(uncond, cond)
            factor = (velocity * guided).sum(_dims(guided)) / guided.square().sum(_dims(guided)).clamp_min(1e-20)
            change = _ratio(_deviation, cond, guided).flatten() - 1
            share = ((factor - 1) * change).sum() / change.square().sum().clamp_min(1e-20)
            # Beyond, the factor could turn the velocity around, which is what a model's other sign does.
            guidance = Guidance(guidance.scale, rule, float(share.clamp(0, 1)))
        made = guidance.combine(uncond, cond)
        if agrees(made, velocity, noise):
            errors[guidance] = float((made - velocity).norm())
    if not errors:
        return None
    # Rounding hides small differences between the rules from `agrees`; the first rule is the simplest.
    least = min(errors.values())
    return next(guidance for guidance, error in errors.items() if error <= _NO_WORSE * least + _TOLERANCE * noise)


def agrees(made: Tensor, velocity: Tensor, noise: float = 0.0) -> bool:
    """Whether a velocity is the one that a run shows, to within rounding; waits for the device.

    Args:
        made: [B, ...], what a rule gives.
        velocity: like made: what the scheduler got.
        noise: norm of what rounding may have done to it.
    """
    error, size = torch.stack([(made - velocity).norm(), velocity.norm()]).tolist()
    return bool(size > 0 and error <= _TOLERANCE * size + noise)


def own_latents(latents: Tensor, output: Tensor, is_batched: bool) -> Tensor:
    """Return the latents that a model's output moves: without channels of a condition, those of one branch.

    Args:
        latents: [B, ...], what the model got.
        output: [B, ...], no larger in any dimension.
        is_batched: whether both branches are halves of the batch.

    Returns:
        A view.

    Raises:
        ValueError: when the output is larger.
    """
    if latents.dim() != output.dim() or any(a < b for a, b in zip(latents.shape, output.shape, strict=True)):
        raise ValueError(
            f"the model's output must be no larger than its latents, got {tuple(output.shape)} for "
            f"{tuple(latents.shape)}"
        )
    own = latents[tuple(slice(size) for size in output.shape)]
    return own.chunk(2)[0] if is_batched else own


def is_doubled(latents: Tensor) -> bool:
    """Whether a batch holds the same latents twice, as guidance in one call does; waits for the device.

    Args:
        latents: [B, ...].
    """
    halves = latents.chunk(2)
    return len(latents) % 2 == 0 and torch.equal(halves[0], halves[-1])


def seen_velocity(before: Tensor, after: Tensor, length: float) -> tuple[Tensor, Tensor]:
    """Return the velocity that Euler's step between two latents shows.

    Args:
        before: [B, ...].
        after: like before.
        length: sigma_next - sigma of the step.

    Returns:
        [B, ...] float32, and [B, ..., 1]: which vectors along the last dimension moved. Those of a condition do not,
        whatever the model says of them.
    """
    return (after.float() - before.float()) / length, (after != before).any(-1, keepdim=True)


def coarsest(*tensors: Tensor) -> torch.dtype:
    """Return the dtype with the largest rounding among those of some tensors."""
    return max((tensor.dtype for tensor in tensors), key=lambda kind: torch.finfo(kind).eps)


def rounding_noise(latents: Tensor, velocity: Tensor, dtype: torch.dtype, length: float) -> float:
    """Return the norm of what rounding may do to the velocity that two latents show.

    Args:
        latents: [B, ...] after the step.
        velocity: [B, ...] that the branches give.
        dtype: the `coarsest` among those of latents and branches.
        length: |sigma_next - sigma| of the step.
    """
    unit = torch.finfo(dtype).eps / 2
    of_latents, of_velocity = torch.stack([latents.float().norm(), velocity.float().norm()]).tolist()
    return float(unit * (of_latents / length + _ROUNDINGS * of_velocity))


def _ratio(size: Callable[[Tensor], Tensor], cond: Tensor, guided: Tensor) -> Tensor:
    """Return the size of cond divided by that of what guidance made of it; 1 where both are nothing."""
    of_cond, of_guided = size(cond), size(guided)
    ratio: Tensor = torch.where(of_guided == 0, 1.0, of_cond / torch.where(of_guided == 0, 1.0, of_guided))
    return ratio


def _dims(tensor: Tensor) -> tuple[int, ...]:
    """Return all dimensions but the first."""
    return tuple(range(1, tensor.dim()))


def _deviation(tensor: Tensor) -> Tensor:
    """Return the standard deviation of each sample."""
    return tensor.std(_dims(tensor), keepdim=True)


def _length(tensor: Tensor) -> Tensor:
    """Return the norm of each vector along the last dimension."""
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    return norms

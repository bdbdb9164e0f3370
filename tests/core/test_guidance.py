"""The rules of guidance, against diffusers' own code where it has some, and found again from what they made."""

import pytest
import torch

from lesa_kernels.guidance import Guidance, estimate_scale, find_guidance, rounding_noise

RULES = [Guidance(3.0), Guidance(1.0), Guidance(5.0, "rescale", 0.7), Guidance(4.0, "norm"), Guidance(-2.0)]


@pytest.fixture
def branches() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    uncond = torch.randn(3, 24, 16, generator=generator)
    return uncond, uncond + 0.2 * torch.randn(3, 24, 16, generator=generator)


def test_linear_is_the_usual_rule(branches):
    uncond, cond = branches
    torch.testing.assert_close(Guidance(3.0).combine(uncond, cond), uncond + 3 * (cond - uncond))


def test_rescale_is_that_of_diffusers(branches):
    ltx = pytest.importorskip(
        "diffusers.pipelines.ltx.pipeline_ltx", reason="diffusers is not installed (extra: diffusers)"
    )
    uncond, cond = branches
    expected = ltx.rescale_noise_cfg(uncond + 5 * (cond - uncond), cond, 0.7)
    torch.testing.assert_close(Guidance(5.0, "rescale", 0.7).combine(uncond, cond), expected)


def test_norm_keeps_the_norm_of_each_vector_of_cond(branches):
    uncond, cond = branches
    guided = Guidance(4.0, "norm").combine(uncond, cond)
    torch.testing.assert_close(guided.norm(dim=-1), cond.norm(dim=-1))
    direction = uncond + 4 * (cond - uncond)
    torch.testing.assert_close(torch.cosine_similarity(guided, direction, dim=-1), torch.ones(3, 24))


@pytest.mark.parametrize("guidance", RULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_branches_pass_unchanged(branches, guidance, dtype):
    velocity = branches[0].to(dtype)
    exact = guidance.rule != "rescale"  # diffusers' sum of two products may round
    torch.testing.assert_close(
        guidance.combine(velocity, velocity), velocity, rtol=0 if exact else torch.finfo(dtype).eps, atol=0
    )


@pytest.mark.parametrize("guidance", RULES, ids=str)
def test_found_from_what_it_made(branches, guidance):
    found = find_guidance(*branches, guidance.combine(*branches))
    assert found is not None
    assert found.rule == guidance.rule
    assert found.scale == pytest.approx(guidance.scale, rel=1e-4)
    assert found.rescale == pytest.approx(guidance.rescale, abs=1e-3)


@pytest.mark.parametrize("guidance", RULES, ids=str)
def test_found_in_latents_of_bfloat16(guidance):
    generator = torch.Generator().manual_seed(1)
    uncond = torch.randn(2, 4096, 16, generator=generator)
    cond = uncond + 0.2 * torch.randn(2, 4096, 16, generator=generator)
    before = torch.randn(2, 4096, 16, generator=generator).bfloat16()
    length = -0.02
    after = (before.float() + length * guidance.combine(uncond, cond)).bfloat16()
    seen = (after.float() - before.float()) / length
    noise = rounding_noise(after, guidance.combine(uncond, cond), torch.bfloat16, abs(length))
    assert noise < 1.5 * seen.norm()
    found = find_guidance(uncond, cond, seen, noise)
    assert found is not None
    assert found.rule == guidance.rule
    assert estimate_scale(uncond, cond, seen, guidance.rule) == pytest.approx(guidance.scale, abs=0.1)


def test_another_rule_is_not_found(branches):
    uncond, cond = branches
    assert find_guidance(uncond, cond, uncond + 3 * (cond - uncond).clamp(-0.1, 0.1)) is None
    assert find_guidance(uncond, cond, torch.zeros_like(uncond)) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, "apg"), "rule must be one of"),
        ((float("nan"),), "scale must be"),
        ((1.0, "rescale", float("inf")), "rescale"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Guidance(*arguments)


def test_the_negative_of_what_the_model_returns_is_no_guidance() -> None:
    uncond, cond = torch.randn(2, 4, 3, 8, generator=torch.Generator().manual_seed(2))
    velocity = Guidance(-2.0).combine(uncond, cond)
    assert find_guidance(uncond, cond, velocity) is not None
    assert find_guidance(-uncond, -cond, velocity) is None

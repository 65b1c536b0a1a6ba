"""Decoupled DMD, guidance rescaling, weights of samples and rewards, on closed-form Gaussian scores."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.decoupled_dmd import decoupled_dmd_loss
from model.dmd import dmd_loss, kl_gradient
from model.query import Guidance, ScoreQuery
from model.reward import reward_weights
from model.schedule import mix
from model.score import ScoreNet, rescaled
from model.sid import sid_loss
from model.types import Conditioning, Evaluations, LossOutput, Rollout, expand_like
from tests.model.test_dmd import SIGMA, exact, normal, prompt, score

COND, NEGATIVE, CFG_SIGMA = prompt(4, 1.0), prompt(4, -0.5), torch.tensor([0.9, 0.7, 0.4, 0.6])


def x0_at(net: ScoreNet, sigma: Tensor, noise: Tensor, text: Tensor) -> Tensor:
    return exact(net).x0(mix(normal(1), noise, sigma), sigma, text).detach().float()


def query_at(rollout: Rollout, real: ScoreNet, fake: ScoreNet, guidance: Guidance) -> ScoreQuery:
    return ScoreQuery(rollout, real, fake, Conditioning(COND), guidance, SIGMA, normal(9))


def decoupled(
    real: ScoreNet, fake: ScoreNet, w: float, cfg_sigma: Tensor = CFG_SIGMA, cfg_seed: int = 10, a: float = 1.0
) -> tuple[LossOutput, Tensor]:
    x0 = normal(1).requires_grad_()
    query = query_at(Rollout(x0), real, fake, Guidance(NEGATIVE, w))
    out = decoupled_dmd_loss(query, cfg_sigma, normal(cfg_seed), cfg_weight=a)
    return out, torch.autograd.grad(out.loss, x0)[0]


def test_both_terms_by_hand_each_at_its_own_noise_and_normalised_there() -> None:
    real, fake, w, a = score(0.0, 0.7), score(0.3, 0.9), 4.0, 0.5
    out, gradient = decoupled(real, fake, w, a=a)
    matching = kl_gradient(normal(1), x0_at(fake, SIGMA, normal(9), COND), x0_at(real, SIGMA, normal(9), COND))
    uncond, cond = (x0_at(real, CFG_SIGMA, normal(10), text) for text in (NEGATIVE, COND))
    augmentation = a * (w - 1) * kl_gradient(normal(1), uncond, cond)
    assert out.kl_gradient is not None
    assert torch.allclose(out.kl_gradient, matching + augmentation, rtol=1e-4, atol=1e-5)
    assert torch.allclose(gradient, (matching + augmentation) / gradient.numel(), rtol=1e-4, atol=1e-7)
    for name, term in (("dm", matching), ("cfg", augmentation), ("dmd", matching + augmentation)):
        expected = term.flatten(1).square().mean(1).sqrt().mean()
        assert float(out.metrics[f"{name}_gradient_norm"]) == pytest.approx(float(expected), rel=1e-4)


def test_with_one_draw_for_both_it_is_dmds_gradient_up_to_the_normaliser() -> None:
    """(F - T_c) + (w - 1) (T_u - T_c) = F - T."""
    real, fake = score(0.0, 0.7), score(0.3, 0.9)
    out, _ = decoupled(real, fake, 4.0, SIGMA, 9)
    dmd = dmd_loss(query_at(Rollout(normal(1)), real, fake, Guidance(NEGATIVE, 4.0))).kl_gradient
    assert out.kl_gradient is not None
    assert dmd is not None
    cond, uncond = (x0_at(real, SIGMA, normal(9), text) for text in (COND, NEGATIVE))
    scales = [(normal(1) - t).abs().flatten(1).mean(1) for t in (cond, uncond + 4 * (cond - uncond))]
    ratio = (scales[1] / scales[0]).reshape(-1, 1, 1, 1, 1)
    assert torch.allclose(out.kl_gradient, dmd * ratio, rtol=1e-3, atol=1e-5)


def test_without_guidance_it_is_dmd_and_costs_no_more() -> None:
    counts, ours = Evaluations(), Evaluations()
    real, fake = score(0.5, 0.7, counts), score(-0.2, 1.3, counts)
    out, gradient = decoupled(score(0.5, 0.7, ours), score(-0.2, 1.3, ours), 1.0)
    x0 = normal(1).requires_grad_()
    dmd = dmd_loss(query_at(Rollout(x0), real, fake, Guidance(NEGATIVE, 1.0)))
    assert torch.equal(out.loss, dmd.loss)
    assert torch.equal(gradient, torch.autograd.grad(dmd.loss, x0)[0])
    assert ours.calls == counts.calls
    assert float(out.metrics["cfg_gradient_norm"]) == 0


def test_fixed_point_and_what_is_left_at_it() -> None:
    """Student = teacher: the matching term is zero; guidance alone still pulls, from the negative to the prompt."""
    _, gradient = decoupled(score(0.0, 0.7), score(0.0, 0.7), 1.0)
    assert bool((gradient == 0).all())
    out, gradient = decoupled(score(0.0, 0.7), score(0.0, 0.7), 4.0)
    assert float(out.metrics["dm_gradient_norm"]) == 0
    assert bool((gradient < 0).all())


def test_frame_mask_and_weights_as_in_dmd() -> None:
    x0, mask, weight = normal(1).requires_grad_(), torch.tensor([False, True, True]), torch.tensor([0.0, 1.0, 2.0, 1.0])
    rollout = Rollout(x0, frame_mask=mask)
    query = replace(query_at(rollout, score(0.0, 0.7), score(0.3, 0.9), Guidance(NEGATIVE, 4.0)), weight=weight)
    out = decoupled_dmd_loss(query, CFG_SIGMA, normal(10))
    gradient = torch.autograd.grad(out.loss, x0)[0]
    assert out.kl_gradient is not None
    assert bool((gradient[:, 0] == 0).all())
    assert bool((gradient[0] == 0).all())
    expected = weight.reshape(-1, 1, 1, 1, 1) * out.kl_gradient[:, 1:] / gradient[:, 1:].numel()
    assert torch.allclose(gradient[:, 1:], expected, rtol=1e-4, atol=1e-7)


def test_rescaling_is_refused_where_there_is_no_guided_score() -> None:
    guidance = Guidance(NEGATIVE, 4.0, rescale=0.7)
    query = query_at(Rollout(normal(1)), score(0.0, 0.7), score(0.3, 0.9), guidance)
    with pytest.raises(ValueError, match="no guided score to rescale"):
        decoupled_dmd_loss(query, CFG_SIGMA, normal(10))


# guidance rescaling


class Stretch(nn.Module):
    """x0 = (1 + 0.4 text) x: guidance changes the spread, which in a Gaussian's mean it does not."""

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return -0.4 * text[:, :1, :1, None, None] * x / expand_like(sigma, x)


@pytest.mark.parametrize("phi", [0.0, 0.7, 1.0])
def test_rescaled_guidance_has_the_conditional_spread_at_phi_1(phi: float) -> None:
    """x0 is 1.4 x with the prompt, 0.8 x without, 3.2 x guided by 4: rescaled phi 1.4 x + (1 - phi) 3.2 x."""
    x = normal(1)
    out = ScoreNet(Stretch(), "teacher").guided_x0(x, SIGMA, COND, NEGATIVE, 4.0, phi)
    assert torch.allclose(out, (phi * 1.4 + (1 - phi) * 3.2) * x, atol=1e-4)


def test_rescaling_acts_on_the_real_score_of_dmd_and_sid_alone() -> None:
    """Value by hand; phi 0 is no rescaling, bit for bit, and a score without guidance has nothing to rescale."""
    real, fake = ScoreNet(Stretch(), "teacher"), ScoreNet(Stretch(), "critic")
    x = mix(normal(1), normal(9), SIGMA)

    def gradient(guidance: Guidance) -> Tensor:
        out = dmd_loss(query_at(Rollout(normal(1)), real, fake, guidance)).kl_gradient
        assert out is not None
        return out

    plain, strong = Guidance(NEGATIVE, 4.0, 2.0), Guidance(NEGATIVE, 4.0, 2.0, rescale=0.7)
    expected = kl_gradient(normal(1), 2.0 * x, (0.7 * 1.4 + 0.3 * 3.2) * x)  # the fake score guided by 2: 2 x
    assert torch.allclose(gradient(strong), expected, rtol=1e-3, atol=1e-4)
    assert torch.allclose(gradient(plain), kl_gradient(normal(1), 2.0 * x, 3.2 * x), rtol=1e-3, atol=1e-4)
    assert torch.equal(gradient(Guidance(NEGATIVE, 1.0, rescale=0.7)), gradient(Guidance(NEGATIVE, 1.0)))
    losses = [sid_loss(query_at(Rollout(normal(1)), real, fake, g)).loss for g in (plain, strong)]
    assert not torch.allclose(*losses, rtol=1e-2)
    for phi in (-0.1, 1.1):
        with pytest.raises(ValueError, match="rescale must be in"):
            rescaled(x, x, phi)


def test_rescaling_is_the_same_in_one_batched_call_or_two() -> None:
    batched, split = ScoreNet(Stretch(), "one"), ScoreNet(Stretch(), "two", batch_guidance=False)
    results = [net.guided_x0(normal(1), SIGMA, COND, NEGATIVE, 4.0, 0.7) for net in (batched, split)]
    assert torch.allclose(*results, atol=1e-6)
    assert batched.evaluations.calls == {"one": 1}
    assert split.evaluations.calls == {"two": 2}


# weights of samples


def test_a_weight_is_each_samples_share_of_loss_and_gradient() -> None:
    real, fake, weight = score(0.5, 0.7), score(-0.2, 1.3), torch.tensor([0.0, 0.5, 1.0, 2.5], requires_grad=True)
    x0, guidance = normal(1).requires_grad_(), Guidance(NEGATIVE, 1.0)
    out = dmd_loss(replace(query_at(Rollout(x0), real, fake, guidance), weight=weight))
    plain = dmd_loss(query_at(Rollout(x0), real, fake, guidance))
    got, full = (torch.autograd.grad(o.loss, x0)[0] for o in (out, plain))
    assert torch.allclose(got, weight.detach().reshape(-1, 1, 1, 1, 1) * full, rtol=1e-5)
    ones = dmd_loss(replace(query_at(Rollout(x0), real, fake, guidance), weight=torch.ones(4)))
    assert torch.equal(ones.loss, plain.loss)  # bit for bit


def test_sid_refuses_weights_that_it_would_ignore() -> None:
    query = query_at(Rollout(normal(1)), score(0.5, 0.7), score(-0.2, 1.3), Guidance(NEGATIVE, 1.0))
    with pytest.raises(ValueError, match="does not weigh samples"):
        sid_loss(replace(query, weight=torch.ones(4)))


def test_reward_weights_by_hand() -> None:
    reward = torch.tensor([0.2, 0.9, -1.0, 0.4], requires_grad=True)
    weight = reward_weights(reward, 0.5, lambda x: x)
    expected = (reward.detach() / 0.5).exp()
    assert torch.allclose(weight, expected / expected.mean(), rtol=1e-5)
    assert not weight.requires_grad
    assert torch.allclose(reward_weights(reward + 7, 0.5, lambda x: x), weight, rtol=1e-4)
    assert torch.allclose(reward_weights(torch.full((3,), 2.0), 0.1, lambda x: x), torch.ones(3))
    assert torch.equal(reward_weights(torch.tensor([0.0, 1e6]), 1e-3, lambda x: x), torch.tensor([0.0, 2.0]))
    for beta in (0.0, -1.0):
        with pytest.raises(ValueError, match="must be positive"):
            reward_weights(reward, beta, lambda x: x)


def test_reward_weights_are_of_the_global_batch() -> None:
    """Two ranks of two samples: each gets what one rank of four would give it."""
    reward, beta = torch.tensor([0.2, 0.9, -1.0, 0.4], dtype=torch.float64), 0.5
    whole = reward_weights(reward, beta, lambda x: x)
    centred = ((reward - reward.mean()) / beta).exp()
    for part in (slice(0, 2), slice(2, 4)):
        sums = iter([torch.stack([reward.sum(), torch.tensor(4.0)]), centred.sum()])
        assert torch.allclose(reward_weights(reward[part], beta, lambda _, sums=sums: next(sums)), whole[part])
    assert float(whole.mean()) == pytest.approx(1.0)

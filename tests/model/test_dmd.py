"""DMD, critic and SiD on Gaussian data, whose scores are known exactly.

For x0 ~ N(m, s^2) and x = (1 - a) x0 + a eps at noise level a:
E[x0 | x] = m + (1 - a) s^2 / ((1 - a)^2 s^2 + a^2) (x - (1 - a) m),   v = (x - E[x0 | x]) / a.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.diffusion import flow_matching_loss
from model.dmd import critic_loss, dmd_loss, kl_gradient
from model.query import Guidance, ScoreQuery
from model.schedule import mix
from model.score import ScoreNet
from model.sid import sid_loss
from model.types import Conditioning, Evaluations, Rollout, expand_like

SHAPE = (3, 2, 4, 4)  # frames, channels, height, width


class GaussianNet(nn.Module):
    """The exact velocity for data N(mean, scale^2); the first number of a prompt's text is added to the mean."""

    def __init__(self, mean: float, scale: float) -> None:
        super().__init__()
        self.mean, self.scale = (nn.Parameter(torch.tensor(value, dtype=torch.float64)) for value in (mean, scale))
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def x0(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        a = expand_like(sigma, x).double()
        mean = self.mean + text[:, 0, 0].double().reshape(-1, 1, 1, 1, 1)
        gain = (1 - a) * self.scale**2 / ((1 - a) ** 2 * self.scale**2 + a**2)
        return mean + gain * (x.double() - (1 - a) * mean)

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        self.seen.append((x.detach().clone(), sigma.clone(), text.clone()))
        return (x.double() - self.x0(x, sigma, text)) / expand_like(sigma, x).double()


def score(mean: float, scale: float, evaluations: Evaluations | None = None) -> ScoreNet:
    return ScoreNet(GaussianNet(mean, scale), f"{mean}", evaluations)


def exact(score_net: ScoreNet) -> GaussianNet:
    """The closed form behind a score."""
    assert isinstance(score_net.net, GaussianNet)
    return score_net.net


def normal(seed: int, batch: int = 4) -> Tensor:
    return torch.randn(batch, *SHAPE, generator=torch.Generator().manual_seed(seed))


def prompt(batch: int, value: float = 0.0) -> Tensor:
    return torch.full((batch, 1, 1), value)


def free(batch: int = 4) -> Guidance:
    return Guidance(prompt(batch), 1.0)


SIGMA = torch.tensor([0.3, 0.5, 0.8, 0.95])


def run_dmd(x0: Tensor, real: ScoreNet, fake: ScoreNet, sigma: Tensor = SIGMA, **rollout: Any) -> tuple[Tensor, Tensor]:
    """Loss and its gradient in x0."""
    x0 = x0.clone().requires_grad_()
    output = dmd_loss(
        ScoreQuery(
            Rollout(x0, **rollout), real, fake, Conditioning(prompt(len(x0))), free(len(x0)), sigma, normal(9, len(x0))
        )
    )
    return output.loss.detach(), torch.autograd.grad(output.loss, x0)[0]


def exact_gradient(x0: Tensor, real: ScoreNet, fake: ScoreNet, sigma: Tensor) -> Tensor:
    """(F - T) / mean|x0 - T|, sample by sample."""
    x = mix(x0, normal(9, len(x0)), sigma)
    text = prompt(len(x0))
    f, t = (exact(net).x0(x, sigma, text).detach() for net in (fake, real))
    return torch.stack([(f[i] - t[i]) / (x0[i] - t[i]).abs().mean() for i in range(len(x0))])


def test_kl_gradient_in_closed_form() -> None:
    """Equal scales, means apart: F - T is (1 - gain (1 - a)) (m_fake - m_real) everywhere."""
    x0, real, fake = normal(1), score(0.5, 1.0), score(-1.0, 1.0)
    out = dmd_loss(ScoreQuery(Rollout(x0), real, fake, Conditioning(prompt(4)), free(), SIGMA, normal(9)))
    a = SIGMA
    keep = 1 - (1 - a) ** 2 / ((1 - a) ** 2 + a**2)
    t = exact(real).x0(mix(x0, normal(9), a), a, prompt(4)).detach()
    expected = keep * -1.5 / (x0 - t).abs().flatten(1).mean(1)
    assert out.kl_gradient is not None
    assert torch.allclose(out.kl_gradient, expand_like(expected, x0).expand_as(x0), rtol=1e-4, atol=1e-5)


def test_loss_gradient_is_the_kl_gradient_over_the_number_of_elements() -> None:
    x0, real, fake = normal(1), score(0.5, 0.7), score(-0.2, 1.3)
    expected = exact_gradient(x0, real, fake, SIGMA).float()
    loss, gradient = run_dmd(x0, real, fake)
    assert torch.allclose(gradient, expected / x0.numel(), rtol=1e-4, atol=1e-8)
    assert float(loss) == pytest.approx(0.5 * float(expected.square().mean()), rel=1e-4)


def test_fixed_point_exact_critic_of_the_teachers_distribution() -> None:
    """Student = teacher: the two scores are one function and the gradient is zero for every sample."""
    loss, gradient = run_dmd(0.5 + 0.7 * normal(1), score(0.5, 0.7), score(0.5, 0.7))
    assert float(loss) == 0
    assert bool((gradient == 0).all())


def test_gradient_descends_towards_the_teachers_mean() -> None:
    for mean in (-2.0, 2.0):
        _, gradient = run_dmd(mean + 0.7 * normal(1), score(0.5, 0.7), score(mean, 0.7))
        assert bool((gradient.sign() == (1 if mean > 0.5 else -1)).all())


def test_student_converges_to_the_teacher_with_the_exact_critic() -> None:
    """x0 = mean + scale eps, trained by nothing but DMD: mean and scale become the teacher's."""
    generator = torch.Generator().manual_seed(0)
    mean, scale = torch.tensor(-1.0, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    real, fake = score(0.8, 0.6), score(-1.0, 0.3)
    for step in range(400):
        with torch.no_grad():
            exact(fake).mean.copy_(mean)
            exact(fake).scale.copy_(scale)
        x0 = mean + scale * torch.randn(32, *SHAPE, generator=generator)
        sigma = 0.02 + 0.96 * torch.rand(32, generator=generator)
        noise = torch.randn(32, *SHAPE, generator=generator)
        out = dmd_loss(ScoreQuery(Rollout(x0), real, fake, Conditioning(prompt(32)), free(32), sigma, noise))
        for p, g in zip((mean, scale), torch.autograd.grad(out.loss, (mean, scale)), strict=True):
            with torch.no_grad():
                p -= 0.1 * g * (1 if step < 300 else 0.2)
    assert float(mean.detach()) == pytest.approx(0.8, abs=0.02)
    assert float(scale.detach()) == pytest.approx(0.6, abs=0.02)


def test_defect_08_guidance_is_uncond_plus_w_times_the_difference() -> None:
    """w = 1 is the conditional net, 0 the unconditional; the negative prompt is really used; one call for both halves."""
    evaluations = Evaluations()
    net = score(0.0, 1.0, evaluations)
    x, cond, negative = normal(1), prompt(4, 2.0), prompt(4, -1.0)
    c, u = (exact(net).x0(x, SIGMA, text) for text in (cond, negative))
    for w in (0.0, 0.5, 1.0, 3.0, 4.0):
        assert torch.allclose(net.guided_x0(x, SIGMA, cond, negative, w), (u + w * (c - u)).float(), atol=1e-4)
    assert evaluations.calls == {"0.0": 5}
    assert evaluations.frames == {"0.0": (2 * 4 + 1) * 4 * 3}


def test_defect_08_guided_scores_in_the_loss() -> None:
    """Each score has its own guidance; the negative embeddings reach both."""
    x0, cond, negative = normal(1), prompt(4, 1.0), prompt(4, -0.5)
    real, fake = score(0.0, 0.7), score(0.3, 0.9)
    out = dmd_loss(
        ScoreQuery(Rollout(x0), real, fake, Conditioning(cond), Guidance(negative, 4.0, 2.0), SIGMA, normal(9))
    )
    x = mix(x0, normal(9), SIGMA)

    def guided(net: ScoreNet, w: float) -> Tensor:
        c, u = (exact(net).x0(x, SIGMA, text).detach().float() for text in (cond, negative))
        return u + w * (c - u)

    expected = kl_gradient(x0, guided(fake, 2.0), guided(real, 4.0))
    assert out.kl_gradient is not None
    assert torch.allclose(out.kl_gradient, expected, rtol=1e-4, atol=1e-5)
    for other in (Guidance(negative, 3.0, 2.0), Guidance(negative, 4.0, 1.0), Guidance(negative + 1, 4.0, 2.0)):
        changed = dmd_loss(ScoreQuery(Rollout(x0), real, fake, Conditioning(cond), other, SIGMA, normal(9))).kl_gradient
        assert changed is not None
        assert float((changed - expected).abs().max()) > 1e-2


def test_defect_07_both_scores_see_the_same_noised_sample() -> None:
    for loss in (dmd_loss, sid_loss):
        real, fake = score(0.5, 0.7), score(-0.2, 1.3)
        loss(ScoreQuery(Rollout(normal(1)), real, fake, Conditioning(prompt(4)), free(), SIGMA, normal(9)))
        (x_real, sigma_real, _), (x_fake, sigma_fake, _) = exact(real).seen[0], exact(fake).seen[0]
        assert torch.equal(x_real, x_fake)
        assert torch.equal(sigma_real, sigma_fake)
        assert torch.equal(x_real, mix(normal(1), normal(9), SIGMA))
        assert torch.equal(sigma_real, SIGMA)


def test_defect_08_normaliser_is_each_samples_own() -> None:
    """What else is in the batch changes nothing but the mean over it."""
    x0 = torch.cat([normal(1, 1), 30 * normal(2, 1)])
    real, fake, sigma = score(0.5, 0.7), score(-0.2, 1.3), torch.tensor([0.4, 0.7])
    both = exact_gradient(x0, real, fake, sigma).float()
    _, gradient = run_dmd(x0, real, fake, sigma)
    assert torch.allclose(gradient, both / x0.numel(), rtol=1e-4, atol=1e-8)
    for i in range(2):
        single = kl_gradient(x0[i : i + 1], torch.ones(1, *SHAPE), torch.zeros(1, *SHAPE))
        pair = kl_gradient(x0, torch.ones(2, *SHAPE), torch.zeros(2, *SHAPE))
        assert torch.equal(single[0], pair[i])
    assert torch.allclose(kl_gradient(x0, x0 * 0 + 1, x0 * 0).flatten(1)[:, 0], 1 / x0.abs().flatten(1).mean(1))


def test_frame_mask_leaves_frames_out_of_loss_and_gradient() -> None:
    x0, real, fake, mask = normal(1), score(0.5, 0.7), score(-0.2, 1.3), torch.tensor([False, True, True])
    loss, gradient = run_dmd(x0, real, fake, frame_mask=mask)
    full = exact_gradient(x0, real, fake, SIGMA).float()  # scores and normaliser still see the whole video
    assert bool((gradient[:, 0] == 0).all())
    assert torch.allclose(gradient[:, 1:], full[:, 1:] / full[:, 1:].numel(), rtol=1e-4, atol=1e-8)
    assert float(loss) == pytest.approx(0.5 * float(full[:, 1:].square().mean()), rel=1e-4)
    everything, _ = run_dmd(x0, real, fake, frame_mask=torch.tensor([True] * 3))
    assert float(everything) == pytest.approx(float(run_dmd(x0, real, fake)[0]), rel=1e-6)


def test_non_finite_values_are_left_for_the_trainer_to_count() -> None:
    loss, _ = run_dmd(normal(1), score(float("nan"), 1.0), score(0.0, 1.0))
    assert not bool(loss.isfinite())


def test_bf16_samples_keep_an_fp32_loss() -> None:
    x0, real, fake = normal(1).bfloat16(), score(0.5, 0.7), score(-0.2, 1.3)
    out = dmd_loss(ScoreQuery(Rollout(x0), real, fake, Conditioning(prompt(4)), free(), SIGMA, normal(9)))
    assert out.loss.dtype is torch.float32
    assert out.kl_gradient is not None
    assert out.kl_gradient.dtype is torch.float32


# critic


def critic_at(critic: ScoreNet, mean: float, scale: float, seed: int, **how: Any) -> Tensor:
    """Critic loss on student samples N(mean, scale^2), 2048 of them."""
    generator = torch.Generator().manual_seed(seed)
    x0 = mean + scale * torch.randn(2048, *SHAPE, generator=generator)
    sigma = 0.1 + 0.88 * torch.rand(2048, generator=generator)
    noise = torch.randn(2048, *SHAPE, generator=generator)
    return critic_loss(Rollout(x0), critic, Conditioning(prompt(2048)), sigma, noise, **how).loss


@pytest.mark.parametrize("x0_target", [False, True], ids=["velocity", "x0"])
def test_defect_09_critic_loss_is_least_at_the_students_own_score(x0_target: bool) -> None:
    """Zero gradient at the closed form up to the samples' own error, and any other critic is worse; both loss types run."""
    best = score(0.4, 0.8)
    loss = critic_at(best, 0.4, 0.8, 0, x0_target=x0_target)
    gradient = torch.stack(torch.autograd.grad(loss, list(best.net.parameters())))
    off = score(0.9, 0.8)
    off_loss = critic_at(off, 0.4, 0.8, 0, x0_target=x0_target)
    off_gradient = torch.stack(torch.autograd.grad(off_loss, list(off.net.parameters())))
    assert float(gradient.norm()) < 0.05 * float(off_gradient.norm())
    assert off_gradient[0] > 0  # its mean would fall
    for mean, scale in ((0.9, 0.8), (0.4, 0.5), (0.4, 1.2), (0.0, 0.8)):
        assert float(critic_at(score(mean, scale), 0.4, 0.8, 0, x0_target=x0_target).detach()) > float(loss.detach())


def test_critic_loss_by_hand_and_conditional_only() -> None:
    critic, x0, noise, text = score(0.1, 0.9), normal(1), normal(2), prompt(4, 0.7)
    out = critic_loss(Rollout(x0), critic, Conditioning(text), SIGMA, noise)
    x = mix(x0, noise, SIGMA)
    velocity = (x.double() - exact(critic).x0(x, SIGMA, text)) / expand_like(SIGMA, x)
    assert float(out.loss.detach()) == pytest.approx(
        float((velocity - (noise - x0)).square().mean().detach()), rel=1e-5
    )
    assert critic.evaluations.calls == {"0.1": 1}
    seen_x, seen_sigma, seen_text = exact(critic).seen[0]
    assert torch.equal(seen_x, x)
    assert torch.equal(seen_sigma, SIGMA)
    assert torch.equal(seen_text, text)


def test_critic_loss_never_reaches_the_student() -> None:
    x0 = normal(1).requires_grad_()
    critic_loss(Rollout(x0), score(0.1, 0.9), Conditioning(prompt(4)), SIGMA, normal(2)).loss.backward()
    assert x0.grad is None


def test_dmd_loss_never_reaches_the_scores() -> None:
    real, fake = score(0.5, 0.7), score(-0.2, 1.3)
    x0 = normal(1).requires_grad_()
    dmd_loss(ScoreQuery(Rollout(x0), real, fake, Conditioning(prompt(4)), free(), SIGMA, normal(9))).loss.backward()
    assert x0.grad is not None
    assert all(p.grad is None for net in (real, fake) for p in net.net.parameters())


def test_critic_learns_only_from_judged_frames() -> None:
    x0, mask = normal(1), torch.tensor([False, True, True])
    conditioning = Conditioning(prompt(4))
    masked = critic_loss(Rollout(x0, frame_mask=mask), score(0.1, 0.9), conditioning, SIGMA, normal(2)).loss
    by_hand = critic_loss(Rollout(x0[:, 1:]), score(0.1, 0.9), conditioning, SIGMA, normal(2)[:, 1:]).loss
    assert float(masked.detach()) == pytest.approx(float(by_hand.detach()), rel=1e-6)


def test_critic_learns_a_students_score_by_gradient_descent() -> None:
    critic = score(-1.0, 0.3)
    optimizer = torch.optim.Adam(critic.net.parameters(), lr=0.05)
    for step in range(150):
        optimizer.zero_grad()
        critic_at(critic, 0.4, 0.8, step).backward()
        optimizer.step()
    mean, scale = (float(p.detach()) for p in critic.net.parameters())
    assert (mean, scale) == pytest.approx((0.4, 0.8), abs=0.03)


def test_flow_matching_weights_are_means_per_sample() -> None:
    x0, noise = normal(1), normal(2)
    weight = torch.tensor([[1.0, 0, 1], [0, 0, 2], [1, 1, 1], [0.5, 0, 0]])
    out = flow_matching_loss(lambda x, s: torch.zeros_like(x), x0, noise, SIGMA, weight=weight)
    per_frame = (noise - x0).square().flatten(2).mean(2)
    expected = ((per_frame * weight).sum(1) / weight.sum(1)).mean()
    assert float(out.loss) == pytest.approx(float(expected), rel=1e-5)
    dropped = flow_matching_loss(lambda x, s: torch.zeros_like(x), x0, noise, SIGMA, weight=torch.zeros(4))
    assert float(dropped.loss) == 0


# SiD


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_in_closed_form(alpha: float) -> None:
    """Value, and gradient through x0 and through both scores' inputs, against the formula by finite differences."""
    real, fake = score(0.5, 0.7), score(-0.2, 1.3)
    x0, noise, text = normal(1).double(), normal(9), prompt(4)
    a = expand_like(SIGMA, x0).double()
    scale = None

    def formula(x0: Tensor) -> Tensor:
        nonlocal scale
        x = (1 - a) * x0 + a * noise.double()
        t, f = (exact(net).x0(x, SIGMA, text).detach() for net in (real, fake))
        if scale is None:  # a constant to the gradient
            scale = (x0 - t).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1, 1)
        return ((t - f) * ((t - x0) - alpha * (t - f)) / scale).mean()

    sample = x0.float().requires_grad_()
    out = sid_loss(ScoreQuery(Rollout(sample), real, fake, Conditioning(text), free(), SIGMA, noise), alpha=alpha)
    assert float(out.loss.detach()) == pytest.approx(float(formula(x0)), rel=1e-4)
    gradient = torch.autograd.grad(out.loss, sample)[0].double()
    for seed in range(3):
        direction = normal(20 + seed).double()
        slope = (formula(x0 + 1e-5 * direction) - formula(x0 - 1e-5 * direction)) / 2e-5
        assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-3, abs=1e-6)


def test_sid_is_at_rest_where_student_and_teacher_agree() -> None:
    x0 = (0.5 + 0.7 * normal(1)).requires_grad_()
    out = sid_loss(
        ScoreQuery(Rollout(x0), score(0.5, 0.7), score(0.5, 0.7), Conditioning(prompt(4)), free(), SIGMA, normal(9))
    )
    assert float(out.loss.detach()) == pytest.approx(0, abs=1e-6)
    assert float(torch.autograd.grad(out.loss, x0)[0].norm()) < 1e-6


def test_defect_12_sid_takes_no_gradient_in_the_scores_weights() -> None:
    """Frozen scores stay without gradient, while the student's goes through them."""
    real, fake = score(0.5, 0.7), score(-0.2, 1.3)
    for net in (real, fake):
        net.net.requires_grad_(False)
    x0 = normal(1).requires_grad_()
    sid_loss(ScoreQuery(Rollout(x0), real, fake, Conditioning(prompt(4)), free(), SIGMA, normal(9))).loss.backward()
    assert x0.grad is not None
    assert float(x0.grad.norm()) > 0
    assert all(p.grad is None for net in (real, fake) for p in net.net.parameters())

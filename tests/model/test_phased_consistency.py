"""Phased DMD and consistency distillation against Gaussian closed forms; alignment of critic with student.

For x0 ~ N(m, c^2) the flow's marginal at level s is N((1 - s) m, (1 - s)^2 c^2 + s^2), and its ODE keeps each point's
distance from the mean in standard deviations.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from model.consistency import adjacent, consistency_loss
from model.dmd import critic_loss, dmd_loss
from model.ida import Alignment
from model.phased import noised_on, phase_start, phased_critic_loss, phased_dmd_loss
from model.query import Guidance, ScoreQuery
from model.schedule import mix, uniform_sigmas
from model.score import ScoreNet
from model.types import Conditioning, Rollout, expand_like
from pipeline.causal import CausalConfig
from pipeline.diffusion_forcing import CleanContext, teacher_forced_velocity
from tests.model.test_dmd import SHAPE, SIGMA, GaussianNet, exact, free, normal, prompt, score
from tests.nets import MICRO, latents, random_net, texts

GIVEN = Conditioning(prompt(4))
START = 0.3
ABOVE = torch.tensor([0.3, 0.5, 0.8, 1.0])


def many(seed: int, count: int = 2048) -> Tensor:
    return normal(seed, count)


# phased DMD


def test_noising_on_from_the_start_gives_the_flows_own_marginal() -> None:
    """x0 -> x_{s0} -> x_s is distributed as x0 -> x_s: mean and spread, at each level."""
    x0 = 0.7 + 0.4 * many(1)
    x_start = mix(x0, many(2), torch.full((2048,), START))
    for s in (0.3, 0.31, 0.6, 1.0):
        x = noised_on(x_start, START, many(3), torch.full((2048,), s))
        assert float(x.mean()) == pytest.approx((1 - s) * 0.7, abs=0.01)
        assert float(x.std()) == pytest.approx(((1 - s) ** 2 * 0.4**2 + s**2) ** 0.5, rel=0.01)
    assert torch.allclose(noised_on(x_start, START, many(3), torch.full((2048,), START)), x_start, atol=1e-6)
    assert torch.allclose(noised_on(normal(1), 0.0, normal(9), SIGMA), mix(normal(1), normal(9), SIGMA), atol=1e-6)


def test_levels_outside_the_interval_are_refused() -> None:
    with pytest.raises(ValueError, match="0.2 lies below its interval's start 0.3"):
        noised_on(normal(1), START, normal(9), torch.tensor([0.5, 0.2, 0.9, 1.0]))
    for start in (1.0, -0.1):
        with pytest.raises(ValueError, match="must start in"):
            noised_on(normal(1), start, normal(9), SIGMA)


def test_phased_dmd_from_0_is_dmd() -> None:
    real, fake, x0 = score(0.5, 0.7), score(-0.2, 1.3), normal(1).requires_grad_()
    dmd = dmd_loss(ScoreQuery(Rollout(x0), real, fake, GIVEN, free(), SIGMA, normal(9)))
    phased = phased_dmd_loss(ScoreQuery(Rollout(x0), real, fake, GIVEN, free(), SIGMA, normal(9)), x0, 0.0)
    assert float(phased.loss.detach()) == pytest.approx(float(dmd.loss.detach()), rel=1e-5)
    got, expected = (torch.autograd.grad(out.loss, x0)[0] for out in (phased, dmd))
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-8)


def test_phased_dmd_by_hand_within_the_interval() -> None:
    """Both scores at the noised-on sample; the gradient reaches x0 through x_{s0}: times 1 - s0."""
    real, fake, x0 = score(0.5, 0.7), score(-0.2, 1.3), normal(1).requires_grad_()
    x_start = phase_start(Rollout(x0), START, normal(8))
    assert torch.equal(x_start, mix(x0, normal(8), torch.full((4,), START)))
    out = phased_dmd_loss(ScoreQuery(Rollout(x0), real, fake, GIVEN, free(), ABOVE, normal(9)), x_start, START)
    x = noised_on(x_start.detach(), START, normal(9), ABOVE)
    f, t = (exact(net).x0(x, ABOVE, prompt(4)).detach().float() for net in (fake, real))
    expected = (f - t) / (x0.detach() - t).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1, 1)
    assert out.kl_gradient is not None
    assert torch.allclose(out.kl_gradient, expected, rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(out.loss, x0)[0]
    assert torch.allclose(got, (1 - START) * expected / x0.numel(), rtol=1e-3, atol=1e-7)
    assert torch.equal(exact(real).seen[0][0], exact(fake).seen[0][0])


def test_phased_fixed_point() -> None:
    x0 = normal(1).requires_grad_()
    x_start = phase_start(Rollout(x0), START, normal(8))
    out = phased_dmd_loss(
        ScoreQuery(Rollout(x0), score(0.5, 0.7), score(0.5, 0.7), GIVEN, free(), ABOVE, normal(9)), x_start, START
    )
    assert float(out.loss.detach()) == 0
    assert bool((torch.autograd.grad(out.loss, x0)[0] == 0).all())


def test_phased_critic_from_0_is_the_critic() -> None:
    ours = phased_critic_loss(normal(1), 0.0, score(0.1, 0.9), GIVEN, SIGMA, normal(2)).loss
    plain = critic_loss(Rollout(normal(1)), score(0.1, 0.9), GIVEN, SIGMA, normal(2)).loss
    assert float(ours.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)


def phased_critic(mean: float, scale: float) -> tuple[Tensor, Tensor]:
    """Loss and its gradient, of a critic that believes in N(mean, scale^2), on x_{s0} of x0 ~ N(0.4, 0.8^2)."""
    x_start = mix(0.4 + 0.8 * many(1), many(2), torch.full((2048,), START))
    sigma = START + (1 - START) * torch.rand(2048, generator=torch.Generator().manual_seed(3))
    critic = score(mean, scale)
    loss = phased_critic_loss(x_start, START, critic, Conditioning(prompt(2048)), sigma, many(4)).loss
    return loss, torch.stack(torch.autograd.grad(loss, list(critic.net.parameters())))


def test_phased_critic_learns_the_score_of_what_the_student_makes_from_noisy_samples_alone() -> None:
    """Its loss is least, and its gradient zero up to sampling, at the exact velocity of the whole flow."""
    loss, gradient = phased_critic(0.4, 0.8)
    assert bool(loss.isfinite())
    for mean, scale in ((0.9, 0.8), (0.4, 0.5), (0.4, 1.2)):
        off, off_gradient = phased_critic(mean, scale)
        assert float(off.detach()) > float(loss.detach())
        assert float(gradient.norm()) < 0.1 * float(off_gradient.norm())


def test_phased_critic_is_finite_at_both_ends_of_the_interval() -> None:
    ends = torch.tensor([START, 1.0, START, 1.0])
    critic = GaussianNet(0.1, 0.9)
    out = phased_critic_loss(normal(1), START, score(0.1, 0.9), GIVEN, ends, normal(2))
    assert bool(out.loss.isfinite())
    assert critic is not None
    out.loss.backward()


# consistency


class Line:
    """The exact consistency function of N(m, c^2) data, as a velocity: x - s v is where the ODE arrives at 0."""

    def __init__(self, mean: float, scale: float) -> None:
        self.mean, self.scale = mean, scale

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = expand_like(sigma, x).double()
        spread = ((1 - s) ** 2 * self.scale**2 + s**2).sqrt()
        end = self.mean + self.scale * (x.double() - (1 - s) * self.mean) / spread
        return torch.where(s > 0, (x.double() - end) / s.clamp_min(1e-12), 0)


class Posterior(Line):
    """The velocity field of the flow itself: as a consistency function it is wrong."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        s = expand_like(sigma, x).double()
        gain = ((1 - s) * self.scale**2 - s) / ((1 - s) ** 2 * self.scale**2 + s**2)
        return -self.mean - gain * (x.double() - (1 - s) * self.mean)


def consistency(student: Line, step: float, **how: float) -> float:
    sigma = torch.tensor([0.9, 0.7, 0.5, 0.3])
    teacher = Posterior(0.5, 0.6)
    clean = 0.5 + 0.6 * normal(1).double()
    return float(
        consistency_loss(student, student, teacher, clean, normal(2).double(), sigma, sigma - step, **how).loss
    )


def test_the_velocity_field_above_is_the_gaussian_one() -> None:
    x, net = normal(1), GaussianNet(0.5, 0.6)
    assert torch.allclose(Posterior(0.5, 0.6)(x, SIGMA), net(x, SIGMA, prompt(4)).detach(), atol=1e-6)


def test_the_ode_flow_map_is_consistent_as_the_teachers_step_shrinks_and_nothing_else_is() -> None:
    """One Euler step errs by h^2, so the exact map's loss falls as h^4; any other's as h^2."""
    exact_map, wrong = Line(0.5, 0.6), Posterior(0.5, 0.6)
    assert consistency(exact_map, 0.1) / consistency(exact_map, 0.05) == pytest.approx(16, rel=0.25)
    assert consistency(wrong, 0.1) / consistency(wrong, 0.05) == pytest.approx(4, rel=0.25)
    assert consistency(exact_map, 0.02) < 1e-2 * consistency(wrong, 0.02)
    assert consistency(exact_map, 0.02) < 1e-2 * consistency(Line(0.0, 0.6), 0.02)


def test_consistency_by_hand_and_gradient_reaches_the_student_alone() -> None:
    class Scaled(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.tensor(value))

        def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
            return self.value * x

    student, average, teacher = Scaled(0.3), Scaled(0.2), Scaled(0.9)
    sigma = torch.tensor([0.9, 0.5, 0.6, 0.4])
    after = torch.tensor([0.7, 0.0, 0.5, 0.3])
    out = consistency_loss(student, average, teacher, normal(1), normal(2), sigma, after)
    x = mix(normal(1), normal(2), sigma)
    s, n = (expand_like(level, x) for level in (sigma, after))
    x_next = x + (n - s) * 0.9 * x
    error = (x - s * 0.3 * x) - (x_next - n * 0.2 * x_next)
    assert float(out.loss.detach()) == pytest.approx(float(error.square().mean()), rel=1e-5)
    out.loss.backward()
    expected = (2 * error * -s * x).mean()
    assert student.value.grad is not None
    assert float(student.value.grad) == pytest.approx(float(expected), rel=1e-4)
    assert average.value.grad is None
    assert teacher.value.grad is None


def test_consistency_with_a_level_a_frame_leaves_given_frames_out() -> None:
    levels = (0.9, 0.6, 0.3)
    sigma, after = adjacent(torch.tensor([[0, 1, 2]] * 4), levels)
    assert sigma[0].tolist() == pytest.approx([0.9, 0.6, 0.3])
    assert after[0].tolist() == pytest.approx([0.6, 0.3, 0.0])
    pinned = sigma.clone()
    pinned[:, 0] = 0
    line, teacher = Line(0.1, 0.9), Posterior(0.5, 0.6)
    part = consistency_loss(line, line, teacher, normal(1), normal(2), pinned, after.where(pinned > 0, 0)).loss
    rest = consistency_loss(line, line, teacher, normal(1)[:, 1:], normal(2)[:, 1:], sigma[:, 1:], after[:, 1:]).loss
    assert float(part) == pytest.approx(float(rest), rel=1e-5)
    assert adjacent(torch.tensor([0]), uniform_sigmas(4, 5.0))[0].tolist() == [1.0]


def test_causal_consistency_of_a_network_sees_clean_frames_before_its_block_and_none_after() -> None:
    """As it is trained: teacher forcing in student, average and guided teacher. Later frames change nothing earlier."""
    causal, guidance = CausalConfig(2), 3.0
    nets = [ScoreNet(random_net(seed), name) for seed, name in enumerate(("student", "average", "teacher"))]
    sigma, after = adjacent(torch.tensor([[0, 0, 1, 1]] * 2), (0.8, 0.4))
    clean, noise, text, negative = latents(5, 2, 4), latents(6, 2, 4), texts(7, 2), texts(8, 2)

    def first_block_gradient(clean: Tensor) -> tuple[Tensor, Tensor]:
        def velocity(net: ScoreNet, x: Tensor, s: Tensor, w: float = 1.0) -> Tensor:
            zero = torch.zeros_like(s)
            return teacher_forced_velocity(
                net, x, s, CleanContext(clean, zero), text, causal, negative=negative, guidance=w
            )

        start = noise.clone().requires_grad_()
        out = consistency_loss(
            lambda x, s: velocity(nets[0], x, s), lambda x, s: velocity(nets[1], x, s),
            lambda x, s: velocity(nets[2], x, s, guidance), clean, start, sigma, after,
        )  # fmt: skip
        return out.loss, torch.autograd.grad(out.loss, start)[0]

    loss, gradient = first_block_gradient(clean)
    later = torch.cat([clean[:, :2], clean[:, 2:] + 1], 1)
    other, changed = first_block_gradient(later)
    assert not torch.allclose(loss, other)
    assert torch.allclose(gradient[:, :2], changed[:, :2], atol=1e-6)
    earlier = torch.cat([clean[:, :2] + 1, clean[:, 2:]], 1)
    assert not torch.allclose(gradient[:, 2:], first_block_gradient(earlier)[1][:, 2:], atol=1e-6)
    assert nets[2].evaluations.calls["teacher"] == 3  # guided in one batched call each


def test_guided_teacher_forcing_is_the_one_convention() -> None:
    net, causal = ScoreNet(random_net(0), "teacher"), CausalConfig(2)
    x, clean, sigma, text, negative = (
        latents(5, 2, 4),
        latents(6, 2, 4),
        torch.full((2, 4), 0.6),
        texts(7, 2),
        texts(8, 2),
    )
    cond, uncond = (
        teacher_forced_velocity(net, x, sigma, CleanContext(clean, 0 * sigma), t, causal).detach()
        for t in (text, negative)
    )
    guided = teacher_forced_velocity(
        net, x, sigma, CleanContext(clean, 0 * sigma), text, causal, negative=negative, guidance=3.0
    )
    assert torch.allclose(guided, uncond + 3 * (cond - uncond), atol=1e-4)
    with pytest.raises(ValueError, match="needs the negative prompt"):
        teacher_forced_velocity(net, x, sigma, CleanContext(clean, 0 * sigma), text, causal, guidance=3.0)


def test_pseudo_huber_is_a_square_near_zero_and_a_norm_far_off() -> None:
    elements = SHAPE[1] * SHAPE[2] * SHAPE[3]
    square = consistency(Line(0.5, 0.6), 0.01)
    assert consistency(Line(0.5, 0.6), 0.01, huber=10.0) == pytest.approx(elements * square / 20, rel=1e-3)
    far = consistency(Line(5.0, 3.0), 0.2, huber=1e-6)
    assert 0 < far < (elements * consistency(Line(5.0, 3.0), 0.2)) ** 0.5  # a mean of norms, not the root of a mean


# implicit distribution alignment


def test_alignment_pulls_every_parameter_of_the_critic_and_leaves_the_student() -> None:
    critic, student = random_net(0), random_net(1)
    before = [{name: p.detach().clone() for name, p in net.named_parameters()} for net in (critic, student)]
    alignment = Alignment(critic, student)
    alignment.update()
    for name, p in critic.named_parameters():
        assert torch.allclose(p, 0.97 * before[0][name] + 0.03 * before[1][name], atol=1e-6), name
    assert all(torch.equal(p, before[1][name]) for name, p in student.named_parameters())
    for _ in range(400):
        alignment.update()
    assert all(torch.allclose(p, before[1][name], atol=1e-4) for name, p in critic.named_parameters())


def test_alignment_of_what_is_trained_alone() -> None:
    critic, student = random_net(0), random_net(1)
    frozen = critic.head.head.weight.detach().clone()
    named = {"head": critic.head.head.bias}, {"head": student.head.head.bias}
    Alignment(critic, student, 0.0, *named).update()
    assert torch.equal(critic.head.head.bias, student.head.head.bias)
    assert torch.equal(critic.head.head.weight, frozen)


def test_alignment_refuses_another_geometry_before_it_begins() -> None:
    critic = random_net(0)
    with pytest.raises(ValueError, match="'blocks.2.cross_attn.k.bias' is trained in the student, not in the critic"):
        Alignment(critic, random_net(1, replace(MICRO, num_layers=3)))
    with pytest.raises(ValueError, match=r"'blocks.0.ffn.0.weight' is \[64, 48\] and \[32, 48\]"):
        Alignment(critic, random_net(1, replace(MICRO, ffn_dim=32)))
    with pytest.raises(ValueError, match="keeps a share"):
        Alignment(critic, random_net(1), 1.5)


def test_guidance_reaches_the_phased_teacher() -> None:
    conditioning, negative = Conditioning(prompt(4, 1.0)), prompt(4, -0.5)
    queries = [
        ScoreQuery(
            Rollout(normal(1)), score(0.0, 0.7), score(0.3, 0.9), conditioning, Guidance(negative, w), ABOVE, normal(9)
        )
        for w in (1.0, 4.0)
    ]
    outs = [phased_dmd_loss(query, normal(1), START).kl_gradient for query in queries]
    assert outs[0] is not None
    assert outs[1] is not None
    assert not torch.allclose(outs[0], outs[1], atol=1e-2)

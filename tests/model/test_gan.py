"""Adversarial losses with a linear discriminator, whose values, gradients and penalties are known exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.discriminator import Discriminator
from model.dmd import dmd_loss
from model.gan import (
    Adversarial,
    NoisedSamples,
    Penalty,
    discriminator_loss,
    discriminator_terms,
    gan_loss,
    generator_terms,
    with_term,
)
from model.ladd import ladd_sigma
from model.query import ScoreQuery
from model.schedule import mix
from model.score import ScoreNet
from model.types import Conditioning, Evaluations, Rollout
from tests.model.test_dmd import SHAPE, SIGMA, free, normal, prompt, score

GIVEN = Conditioning(prompt(4))


class Eye(nn.Module):
    """A backbone whose one feature is the sample; what it saw is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, features: Sequence[int]) -> list[Tensor]:
        self.seen.append((x.detach().clone(), sigma, text))
        return [x]


class Linear(nn.Module):
    """K logits w_k . x + b_k."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.einsum("bfchw,kfchw->bk", features[0], self.weight) + self.bias


def linear(seed: int = 30, heads: int = 2, scale: float = 0.1) -> Discriminator:
    bias = torch.linspace(-0.3, 0.4, heads)
    return Discriminator(ScoreNet(Eye(), "eye", Evaluations()), Linear(scale * normal(seed, heads), bias), (0,))


def seen(judge: Discriminator) -> list[tuple[Tensor, Tensor, Tensor]]:
    assert isinstance(judge.backbone.net, Eye)
    return judge.backbone.net.seen


def by_hand(judge: Discriminator, x: Tensor) -> Tensor:
    weight, bias = (p.detach() for p in judge.heads.parameters())
    return x.flatten(1) @ weight.flatten(1).T + bias


def real(x0: Tensor, sigma: Tensor = SIGMA, seed: int = 41) -> NoisedSamples:
    return NoisedSamples(x0, Conditioning(prompt(len(x0), 1.0)), sigma, normal(seed, len(x0)))


def student(x0: Tensor, frame_mask: Tensor | None = None) -> NoisedSamples:
    return NoisedSamples.of(Rollout(x0, frame_mask=frame_mask), GIVEN, SIGMA, normal(9))


def test_students_loss_and_gradient_by_hand() -> None:
    """d/dx softplus(-D) = -sigmoid(-D) (1 - s) w, a mean over heads and samples."""
    judge, x0 = linear(), normal(1).requires_grad_()
    out = gan_loss(student(x0), judge)
    logits = by_hand(judge, mix(x0.detach(), normal(9), SIGMA))
    assert float(out.loss.detach()) == pytest.approx(float((1 + (-logits).exp()).log().mean()), rel=1e-5)
    slope = torch.einsum("bk,kfchw->bfchw", torch.sigmoid(-logits), judge.heads.weight.detach())
    expected = -(1 - SIGMA).reshape(-1, 1, 1, 1, 1) * slope / (2 * 4)
    assert torch.allclose(torch.autograd.grad(out.loss, x0)[0], expected, rtol=1e-4, atol=1e-7)


def test_discriminators_loss_and_gradient_by_hand_at_each_ones_own_noise() -> None:
    judge, data = linear(), real(normal(2) + 1, SIGMA.flip(0))
    x0 = normal(1).requires_grad_()
    out = discriminator_loss(student(x0), data, judge)
    x_fake = mix(x0.detach(), normal(9), SIGMA)
    x_real = mix(normal(2) + 1, normal(41), SIGMA.flip(0))
    fake, true = by_hand(judge, x_fake), by_hand(judge, x_real)
    expected = ((1 + fake.exp()).log() + (1 + (-true).exp()).log()).mean()
    assert float(out.loss.detach()) == pytest.approx(float(expected), rel=1e-5)
    slopes = torch.einsum("bk,bfchw->kfchw", torch.sigmoid(fake), x_fake)
    slopes = slopes - torch.einsum("bk,bfchw->kfchw", torch.sigmoid(-true), x_real)
    out.loss.backward()
    assert torch.allclose(judge.heads.weight.grad, slopes / (2 * 4), rtol=1e-4, atol=1e-6)
    assert x0.grad is None  # never the student
    assert torch.equal(seen(judge)[1][2], prompt(4, 1.0))
    assert torch.equal(seen(judge)[1][1], SIGMA.flip(0))


def test_the_other_kinds_by_hand() -> None:
    fake, true = torch.tensor([[0.5, -2.0]]), torch.tensor([[1.5, 0.25]])
    softplus = torch.nn.functional.softplus
    pairs = {
        Adversarial.softplus: (softplus(-fake), softplus(fake) + softplus(-true)),
        Adversarial.relativistic: (softplus(true - fake), softplus(fake - true)),
        Adversarial.hinge: (-fake, torch.tensor([[1.5 + 0.0, 0.0 + 0.75]])),
    }
    for kind, (generator, discriminator) in pairs.items():
        assert torch.allclose(generator_terms(fake, true, kind), generator.mean(1))
        assert torch.allclose(discriminator_terms(fake, true, kind), discriminator.mean(1))
    with pytest.raises(ValueError, match="compares with real samples"):
        gan_loss(student(normal(1)), linear(), kind=Adversarial.relativistic)


def test_relativistic_pairs_sample_by_sample_and_gives_the_student_no_gradient_through_the_real_ones() -> None:
    judge, x0, data = linear(), normal(1).requires_grad_(), real(normal(2))
    out = gan_loss(student(x0), judge, kind=Adversarial.relativistic, real=data)
    fake = by_hand(judge, mix(x0.detach(), normal(9), SIGMA))
    true = by_hand(judge, mix(normal(2), normal(41), SIGMA))
    assert float(out.loss.detach()) == pytest.approx(float((1 + (true - fake).exp()).log().mean()), rel=1e-5)
    slope = torch.einsum("bk,kfchw->bfchw", torch.sigmoid(true - fake), judge.heads.weight.detach())
    expected = -(1 - SIGMA).reshape(-1, 1, 1, 1, 1) * slope / (2 * 4)
    assert torch.allclose(torch.autograd.grad(out.loss, x0)[0], expected, rtol=1e-4, atol=1e-7)


def penalised(penalty: Penalty, judge: Discriminator, **steps: Any) -> dict[str, Tensor]:
    out = discriminator_loss(student(normal(1)), real(normal(2)), judge, penalty=penalty, **steps)
    plain = discriminator_loss(student(normal(1)), real(normal(2)), judge)
    extra = penalty.r1 * out.metrics.get("r1", 0) + penalty.r2 * out.metrics.get("r2", 0)
    assert float((out.loss - plain.loss).detach()) == pytest.approx(float(extra), rel=1e-3, abs=1e-4)
    return out.metrics


@pytest.mark.parametrize("step", [0.01, 0.1])
def test_r1_and_r2_of_a_linear_discriminator(step: float) -> None:
    """D(x + a n) - D(x) = a w . n: squared as it is, or divided by a^2, whose mean over n is |grad D|^2 = |w|^2."""
    judge = linear()
    weight = judge.heads.weight.detach().flatten(1)
    n1, n2 = normal(50), normal(51)
    expected = [float((n.flatten(1) @ weight.T).square().mean()) for n in (n1, n2)]
    got = penalised(Penalty(100.0, 10.0, step), judge, real_step=n1, fake_step=n2)
    assert float(got["r1"]) == pytest.approx(step**2 * expected[0], rel=1e-2)
    assert float(got["r2"]) == pytest.approx(step**2 * expected[1], rel=1e-2)
    per_step = penalised(Penalty(1.0, 1.0, step, per_step=True), judge, real_step=n1, fake_step=n2)
    assert float(per_step["r1"]) == pytest.approx(expected[0], rel=1e-2)
    draws = torch.cat([(normal(100 + i, 64).flatten(1) @ weight.T).square() for i in range(32)])
    assert float(draws.mean()) == pytest.approx(float(weight.square().sum(1).mean()), rel=0.1)


def test_r1_trains_the_discriminator_towards_no_slope() -> None:
    """Its gradient in w is that of a^2 mean (w . n)^2: along w on average, so |w| falls."""
    judge, n = linear(), normal(50)
    loss = discriminator_loss(student(normal(1)), real(normal(2)), judge, penalty=Penalty(r1=7.0), real_step=n).loss
    without = discriminator_loss(student(normal(1)), real(normal(2)), judge).loss
    weight = judge.heads.weight
    got = torch.autograd.grad(loss, weight)[0] - torch.autograd.grad(without, weight)[0]
    dots = n.flatten(1) @ weight.detach().flatten(1).T
    expected = 7.0 * 0.1**2 * 2 * torch.einsum("bk,bfchw->kfchw", dots, n) / (2 * 4)
    assert torch.allclose(got, expected, rtol=1e-2, atol=1e-4)
    assert float((got * weight.detach()).sum()) > 0


def test_defect_13_r1_compares_two_noised_samples() -> None:
    """The perturbed one is x_t + a n, and nothing is perturbed before it is noised."""
    judge, n = linear(), normal(50)
    discriminator_loss(student(normal(1)), real(normal(2)), judge, penalty=Penalty(r1=1.0), real_step=n)
    x_fake, x_real, moved = (x for x, _, _ in seen(judge))
    assert torch.equal(x_fake, mix(normal(1), normal(9), SIGMA))
    assert torch.equal(x_real, mix(normal(2), normal(41), SIGMA))
    assert torch.allclose(moved, x_real + 0.1 * n)
    assert all(torch.equal(sigma, SIGMA) for _, sigma, _ in seen(judge))
    assert judge.backbone.evaluations.calls == {"eye": 3}  # no penalty that is not asked for


def test_penalties_that_cannot_be_are_refused() -> None:
    for wrong in ({"r1": -1.0}, {"r2": -1.0}, {"step": 0.0}):
        with pytest.raises(ValueError, match="r1 and r2 must be >= 0"):
            Penalty(**wrong)


def at_optimum(mean_real: float, mean_fake: float, *, scale: float = 1.0, bias: float = 0.0) -> Tensor:
    """Gradient, along the mean's direction and in the bias, of the discriminator that knows log p / q of N(mean, 1)
    data noised to one level, or of one that is off by these; on 4096 samples of each."""
    sigma = torch.full((4096,), 0.5)
    variance = 0.5**2 + 0.5**2
    slope = scale * 0.5 * (mean_real - mean_fake) / variance
    offset = -0.5 * (0.5**2) * (mean_real**2 - mean_fake**2) / variance * 96
    heads = Linear(torch.full((1, *SHAPE), slope), torch.tensor([offset + bias]))
    judge = Discriminator(ScoreNet(Eye(), "eye"), heads, (0,))
    fake, true = normal(60, 4096) + mean_fake, normal(61, 4096) + mean_real
    conditioning = Conditioning(prompt(4096))
    data = NoisedSamples(true, conditioning, sigma, normal(62, 4096))
    loss = discriminator_loss(NoisedSamples.of(Rollout(fake), conditioning, sigma, normal(63, 4096)), data, judge).loss
    weight, offsets = torch.autograd.grad(loss, list(heads.parameters()))
    return torch.stack([weight.sum() / 96**0.5, offsets.sum()])


def test_the_log_density_ratio_is_the_discriminators_fixed_point() -> None:
    best = float(at_optimum(0.08, -0.04).norm())
    for off in ({"scale": 3.0}, {"scale": 0.0}, {"bias": 1.0}, {"bias": -1.0}):
        assert best < 0.1 * float(at_optimum(0.08, -0.04, **off).norm()), off


def test_fixed_point_of_student_and_discriminator() -> None:
    """Where the student makes the data, D = 0 is the discriminator's optimum, and there the student gets no gradient."""
    assert float(at_optimum(0.3, 0.3).norm()) < 0.1 * float(at_optimum(0.3, 0.3, bias=1.0).norm())
    judge, x0 = linear(scale=0.0), normal(1).requires_grad_()
    out = gan_loss(student(x0), judge)
    assert bool((torch.autograd.grad(out.loss, x0)[0] == 0).all())


def test_frames_that_no_loss_may_judge_are_seen_but_get_no_gradient() -> None:
    x0, mask = normal(1).requires_grad_(), torch.tensor([False, True, True])
    masked = gan_loss(student(x0, frame_mask=mask), linear()).loss
    whole = gan_loss(student(x0), linear()).loss
    assert torch.equal(masked, whole)
    got, full = torch.autograd.grad(masked, x0)[0], torch.autograd.grad(whole, x0)[0]
    assert bool((got[:, 0] == 0).all())
    assert torch.equal(got[:, 1:], full[:, 1:])


def test_dmd2_is_dmd_and_a_weighted_gan_term() -> None:
    x0, judge = normal(1).requires_grad_(), linear()
    dmd = dmd_loss(ScoreQuery(Rollout(x0), score(0.5, 0.7), score(-0.2, 1.3), GIVEN, free(), SIGMA, normal(9)))
    gan = gan_loss(NoisedSamples.of(Rollout(x0), GIVEN, SIGMA.flip(0), normal(10)), judge)
    both = with_term(dmd, gan, 0.03)
    assert float(both.loss.detach()) == pytest.approx(float((dmd.loss + 0.03 * gan.loss).detach()), rel=1e-6)
    assert both.kl_gradient is dmd.kl_gradient
    assert torch.equal(both.metrics["loss"], both.loss.detach())
    assert torch.equal(both.metrics["gan_loss"], gan.loss.detach())
    assert "dmd_gradient_norm" in both.metrics
    assert not any(value.requires_grad for value in both.metrics.values())


def test_ladds_noise_levels_are_logit_normal() -> None:
    draws = ladd_sigma(torch.randn(20000, generator=torch.Generator().manual_seed(0)), mean=1.0, std=0.5)
    logits = (draws / (1 - draws)).log()
    assert float(draws.min()) > 0
    assert float(draws.max()) < 1
    assert (float(logits.mean()), float(logits.std())) == pytest.approx((1.0, 0.5), abs=0.02)
    with pytest.raises(ValueError, match="must be positive"):
        ladd_sigma(torch.zeros(1), std=0.0)


def test_a_student_learns_the_datas_mean_from_the_discriminator_alone() -> None:
    """LADD's whole loop on N(m, 1): heads and student in turn, R1 keeps them from circling."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mean, judge = torch.tensor(-0.5, requires_grad=True), linear(heads=1, scale=0.0)
    conditioning, penalty = Conditioning(prompt(32)), Penalty(r1=0.5, per_step=True, step=0.01)
    heads = torch.optim.SGD(judge.heads.parameters(), lr=0.05)
    for _ in range(250):
        shape = (32, *SHAPE)
        made, sigma, noise = Rollout(mean + draw(*shape)), ladd_sigma(draw(32), mean=0.0), draw(*shape)
        data = NoisedSamples(0.8 + draw(*shape), conditioning, ladd_sigma(draw(32), mean=0.0), draw(*shape))
        heads.zero_grad()
        discriminator_loss(
            NoisedSamples.of(made, conditioning, sigma, noise), data, judge, penalty=penalty, real_step=draw(*shape)
        ).loss.backward()
        heads.step()
        slope = torch.autograd.grad(gan_loss(NoisedSamples.of(made, conditioning, sigma, noise), judge).loss, mean)[0]
        with torch.no_grad():
            mean -= 0.02 * slope
    assert float(mean.detach()) == pytest.approx(0.8, abs=0.1)

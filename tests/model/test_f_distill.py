"""f-distill: the weights against their divergences, its reduction to DMD, and what its normalisation does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.discriminator import Discriminator
from model.dmd import dmd_loss
from model.f_distill import (
    Divergence,
    RatioBins,
    RatioClip,
    RatioWeighting,
    density_ratio,
    f_distill_loss,
    f_weights,
    h,
)
from model.gan import NoisedSamples, gan_loss
from model.query import ScoreQuery
from model.score import ScoreNet
from model.types import Conditioning, LossOutput, Rollout
from tests.model.test_dmd import SHAPE, SIGMA, free, normal, prompt, score
from tests.model.test_gan import Eye, Linear, linear

GIVEN = Conditioning(prompt(4))

# f(r), r = p / q, of D_f(p || q) = E_q[f(r)], up to a constant factor and to terms linear in r
F: dict[Divergence, Callable[[Tensor], Tensor]] = {
    Divergence.rkl: lambda r: -r.log(),
    Divergence.kl: lambda r: r * r.log(),
    Divergence.js: lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
    Divergence.sf: lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
    Divergence.neyman: lambda r: (1 - r) ** 2 / r,
    Divergence.sh: lambda r: (1 - r.sqrt()) ** 2,
    Divergence.jf: lambda r: (r - 1) * r.log(),
}


def alone(x: Tensor) -> Tensor:
    """The sum over one rank."""
    return x


@pytest.mark.parametrize("divergence", Divergence)
def test_h_is_the_second_derivative_times_r_squared(divergence: Divergence) -> None:
    r = torch.logspace(-2, 2, 41, dtype=torch.float64, requires_grad=True)
    first = torch.autograd.grad(F[divergence](r).sum(), r, create_graph=True)[0]
    second = torch.autograd.grad(first.sum(), r)[0]
    factor = second * r.detach() ** 2 / h(divergence, r.detach())
    assert torch.allclose(factor, factor[0].expand_as(factor), rtol=1e-6)
    assert float(factor[0]) == pytest.approx({"neyman": 2.0, "sh": 0.5}.get(divergence.value, 1.0))


@pytest.mark.parametrize("divergence", Divergence)
def test_weighted_score_difference_is_the_gradient_of_the_divergence(divergence: Divergence) -> None:
    """d/dm D_f(N(0, 1) || N(m, 1)) = -E_q[f''(r) r^2 (grad log p - grad log q)], by quadrature (theorem 1)."""
    x, mean = torch.linspace(-12, 12, 4001, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    width = float(x[1] - x[0])

    def density(m: Tensor | float) -> Tensor:
        return (-0.5 * (x - m) ** 2).exp() / (2 * torch.pi) ** 0.5

    def value(m: Tensor) -> Tensor:
        return (density(m) * F[divergence](density(0.0) / density(m))).sum() * width

    m = mean.clone().requires_grad_()
    slope = torch.autograd.grad(value(m), m)[0]
    r, scores = density(0.0) / density(mean), -x + (x - mean)
    weighted = -(density(mean) * h(divergence, r) * scores).sum() * width
    factor = {"neyman": 2.0, "sh": 0.5}.get(divergence.value, 1.0)
    assert float(factor * weighted) == pytest.approx(float(slope), rel=1e-6)


def run(divergence: Divergence, judge: Discriminator, gan_weight: float = 0.0, bins: RatioBins | None = None, fake_mean: float = -0.2) -> tuple[LossOutput, Tensor]:  # fmt: skip
    x0 = normal(1).requires_grad_()
    fake = score(fake_mean, 1.3 if fake_mean != 0.5 else 0.7)
    query = ScoreQuery(Rollout(x0), score(0.5, 0.7), fake, GIVEN, free(), SIGMA, normal(9))
    out = f_distill_loss(query, judge, RatioWeighting(divergence, alone, bins), gan_weight=gan_weight)
    return out, torch.autograd.grad(out.loss, x0)[0]


def plain() -> tuple[LossOutput, Tensor]:
    x0 = normal(1).requires_grad_()
    out = dmd_loss(ScoreQuery(Rollout(x0), score(0.5, 0.7), score(-0.2, 1.3), GIVEN, free(), SIGMA, normal(9)))
    return out, torch.autograd.grad(out.loss, x0)[0]


@pytest.mark.parametrize("with_bins", [False, True])
def test_rkl_is_dmd_bit_for_bit_and_no_other_is(with_bins: bool) -> None:
    (dmd, gradient), judge = plain(), linear(scale=1.0)
    for divergence in Divergence:
        out, got = run(divergence, judge, bins=RatioBins() if with_bins else None)
        same = torch.equal(out.loss, dmd.loss) and torch.equal(got, gradient)
        assert same == (divergence is Divergence.rkl), divergence


def test_each_samples_gradient_is_dmds_times_its_weight() -> None:
    judge, (_, gradient) = linear(), plain()
    x = (1 - SIGMA).reshape(-1, 1, 1, 1, 1) * normal(1) + SIGMA.reshape(-1, 1, 1, 1, 1) * normal(9)
    logit = judge.heads([x]).detach().mean(1)
    r = logit.clamp(-10, 10).exp().clamp(0.1, 20)
    assert float(r.std()) > 0.1
    for divergence in (Divergence.kl, Divergence.js):
        weight = h(divergence, r) / h(divergence, r).mean()
        _, got = run(divergence, judge)
        assert torch.allclose(got, weight.reshape(-1, 1, 1, 1, 1) * gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("divergence", Divergence)
def test_fixed_point_student_that_is_the_teacher(divergence: Divergence) -> None:
    out, got = run(divergence, linear(), fake_mean=0.5)
    assert float(out.loss.detach()) == 0
    assert bool((got == 0).all())


def test_gan_term_at_the_same_noised_sample_from_one_evaluation() -> None:
    judge = linear()
    _, weighted = run(Divergence.kl, judge)
    assert judge.backbone.evaluations.calls == {"eye": 1}
    out, got = run(Divergence.kl, judge, gan_weight=0.3)
    assert judge.backbone.evaluations.calls == {"eye": 2}
    x0 = normal(1).requires_grad_()
    gan = torch.autograd.grad(gan_loss(NoisedSamples.of(Rollout(x0), GIVEN, SIGMA, normal(9)), linear()).loss, x0)[0]
    assert torch.allclose(got, weighted + 0.3 * gan, rtol=1e-4, atol=1e-8)
    assert {"ratio", "weight_max", "weight_min", "gan_loss"} <= out.metrics.keys()


def test_weights_of_a_larger_batch_come_with_their_ratios() -> None:
    """With both the loss weighs as `f_weights` did; with only one of them it refuses."""
    judge, weighting = linear(), RatioWeighting(Divergence.kl, alone)
    query = ScoreQuery(Rollout(normal(1)), score(0.5, 0.7), score(-0.2, 1.3), GIVEN, free(), SIGMA, normal(9))
    logits = NoisedSamples.of(query.rollout, GIVEN, SIGMA, normal(9)).logits(judge)
    weight, ratio = f_weights(logits, SIGMA, weighting)
    known = f_distill_loss(replace(query, weight=weight), judge, weighting, ratio=ratio)
    assert torch.equal(known.loss, f_distill_loss(query, judge, weighting).loss)
    assert torch.equal(known.metrics["ratio"], ratio.mean())
    for half in (replace(query, weight=weight), query):
        with pytest.raises(ValueError, match="weights come with their ratios"):
            f_distill_loss(half, judge, weighting, ratio=None if half.weight is not None else ratio)


def test_a_linear_discriminators_ratio_is_the_densities_own() -> None:
    """p = N(m, 1), q = N(0, 1) noised to a: log p / q is linear in x; the ratio of its logit is the exact one."""
    m, a = 0.1, 0.5
    variance, centre = (1 - a) ** 2 + a**2, (1 - a) * m
    slope = centre / variance
    offset = torch.tensor([-(centre**2) / (2 * variance) * 96])
    judge = Discriminator(ScoreNet(Eye(), "eye"), Linear(torch.full((1, *SHAPE), slope), offset), (0,))
    x = variance**0.5 * normal(3, 64)
    conditioning, sigma = Conditioning(prompt(64)), torch.full((64,), a)
    r = density_ratio(judge.logits(x, sigma, conditioning), RatioClip(10, 1e-4, 1e4))
    exact = ((x.square() - (x - centre).square()) / (2 * variance)).flatten(1).sum(1).exp()
    assert torch.allclose(r, exact, rtol=1e-3)
    assert not r.requires_grad


def test_ratio_clips_and_means_over_heads() -> None:
    logits = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [0.4, 0.8], [float("inf"), 0.0]])
    assert density_ratio(logits, RatioClip()).tolist() == pytest.approx([20.0, 0.1, 2.718281828**0.6, 20.0])
    assert density_ratio(logits, RatioClip(3.0, 1e-9, 1e9)).tolist()[:2] == pytest.approx([20.0855, 0.049787], rel=1e-4)
    for wrong in ((0.0, 0.1, 20.0), (10.0, 0.0, 20.0), (10.0, 2.0, 20.0), (10.0, 0.1, 0.5)):
        with pytest.raises(ValueError, match="low <= 1 <= high"):
            RatioClip(*wrong)


def test_bins_by_hand() -> None:
    """rho of the old mean, which begins at 1; bins without samples stay; sigma 1 is in the last bin."""
    bins = RatioBins(rho=0.5)
    sigma = torch.tensor([0.01, 0.09, 0.55, 1.0])
    r = bins.normalised(torch.tensor([2.0, 4.0, 3.0, 0.5]), sigma, alone)
    assert bins.means.tolist() == pytest.approx([2.0, 1, 1, 1, 1, 2.0, 1, 1, 1, 0.75])
    assert r.tolist() == pytest.approx([1.0, 2.0, 1.5, 0.5 / 0.75])
    bins.normalised(torch.tensor([6.0]), torch.tensor([0.05]), alone)
    assert bins.means[0] == pytest.approx(4.0)


def test_bins_learn_the_mean_at_their_noise_level() -> None:
    bins, generator = RatioBins(rho=0.9), torch.Generator().manual_seed(0)
    for _ in range(60):
        sigma = torch.rand(64, generator=generator)
        bins.normalised(1 + 4 * (sigma > 0.5) + 0.1 * torch.randn(64, generator=generator), sigma, alone)
    assert torch.allclose(bins.means, torch.tensor([1.0] * 5 + [5.0] * 5), atol=0.1)


def test_defect_13_rho_that_would_make_every_ratio_one_is_refused() -> None:
    for rho in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="rho must be in"):
            RatioBins(rho)
    r = RatioBins(0.5).normalised(torch.tensor([3.0]), torch.tensor([0.2]), alone)
    assert float(r) == pytest.approx(1.5)  # one sample a bin is not divided by itself


def test_two_ranks_weigh_as_one_with_all_samples() -> None:
    """Sums and counts, not means, go over the ranks: bins and weights are those of the whole batch."""
    logits, sigma = normal(70, 6).flatten(1)[:, :1] * 2, torch.tensor([0.1, 0.12, 0.5, 0.13, 0.55, 0.9])
    whole_bins = RatioBins()
    whole, _ = f_weights(logits, sigma, RatioWeighting(Divergence.kl, alone, whole_bins))
    assert float(whole.mean()) == pytest.approx(1.0, rel=1e-5)

    parts, bins = (slice(0, 2), slice(2, 6)), (RatioBins(), RatioBins())
    known: list[Tensor] = []  # the sums of both ranks, collective by collective, found out in rounds

    def of_rank(rank: int, local: list[Tensor]) -> Tensor:
        def total(x: Tensor) -> Tensor:
            local.append(x)
            return known[len(local) - 1] if len(local) <= len(known) else x

        bins[rank].load(RatioBins().state())
        weighting = RatioWeighting(Divergence.kl, total, bins[rank])
        return f_weights(logits[parts[rank]], sigma[parts[rank]], weighting)[0]

    for _ in range(3):
        sums: tuple[list[Tensor], list[Tensor]] = ([], [])
        weights = torch.cat([of_rank(rank, sums[rank]) for rank in range(2)])
        known = [a + b for a, b in zip(*sums, strict=True)]
    assert len(known) == 2  # collectives a step
    assert torch.allclose(weights, whole, rtol=1e-5)
    assert all(torch.allclose(rank_bins.means, whole_bins.means) for rank_bins in bins)


def test_bins_forget_a_step_that_was_not_finite() -> None:
    bins = RatioBins()
    r = bins.normalised(torch.tensor([float("nan"), 3.0]), torch.tensor([0.35, 0.75]), alone)
    assert not bool(r[0].isfinite())
    assert bins.means.tolist() == [1, 1, 1, 1, 1, 1, 1, 2, 1, 1]


def test_bins_go_on_from_their_state() -> None:
    first = RatioBins()
    first.normalised(torch.tensor([4.0]), torch.tensor([0.3]), alone)
    second = RatioBins()
    second.load(first.state())
    again = [b.normalised(torch.tensor([2.0]), torch.tensor([0.3]), alone) for b in (first, second)]
    assert torch.equal(*again)
    assert torch.equal(first.means, second.means)
    assert float(first.means[3]) != 1

"""f-distill (arXiv 2502.15681): DMD for any f-divergence, each sample weighted by h(r) = f''(r) r^2.

r = p_real / p_student at the noised sample, which the discriminator of the GAN term knows: its logit is log r.
D_f = E_student[f(r)]; the reverse KL, f = -log r, has h = 1: DMD itself.

B batch  K logits of a sample
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import assert_never

import torch
from torch import Tensor

from model.discriminator import Discriminator
from model.dmd import dmd_loss
from model.gan import Adversarial, NoisedSamples, generator_terms, with_term
from model.query import ScoreQuery
from model.types import LossOutput, Total

BINS = 10
LEAST = 1e-8


class Divergence(Enum):
    """Reverse, forward KL, Jensen-Shannon, softened reverse KL, Neyman's chi squared, squared Hellinger, Jeffreys."""

    rkl = "rkl"
    kl = "kl"
    js = "js"
    sf = "sf"
    neyman = "neyman"
    sh = "sh"
    jf = "jf"


def h(divergence: Divergence, r: Tensor) -> Tensor:
    """f''(r) r^2 up to a constant factor (f-distill, table 1), which normalisation by the mean takes out."""
    match divergence:
        case Divergence.rkl:
            return torch.ones_like(r)
        case Divergence.kl:
            return r
        case Divergence.js:
            return r / (1 + r)
        case Divergence.sf:
            return 1 / (1 + r)
        case Divergence.neyman:
            return 1 / r.clamp_min(LEAST)
        case Divergence.sh:
            return r.sqrt()
        case Divergence.jf:
            return 1 + r
        case _:
            assert_never(divergence)


@dataclass(frozen=True)
class RatioClip:
    """How a logit becomes a ratio: clip(exp(clamp(logit, +-logit)), low, high)."""

    logit: float = 10.0
    low: float = 0.1
    high: float = 20.0

    def __post_init__(self) -> None:
        if self.logit <= 0 or not 0 < self.low <= 1 <= self.high:
            raise ValueError(
                "the ratio's clip must have logit > 0 and 0 < low <= 1 <= high, got "
                f"{self.logit}, {self.low} and {self.high}"
            )


def density_ratio(logits: Tensor, clip: RatioClip) -> Tensor:
    """r [B], fp32, detached, of logits [B, K], which count by their mean: r is a geometric mean of the heads'."""
    return logits.detach().float().mean(1).clamp(-clip.logit, clip.logit).exp().clamp(clip.low, clip.high)


class RatioBins:
    """Running means of r in uniform bins of sigma; r divided by its bin's mean has mean 1 at each noise level, as the
    true ratio has under the student.

    rho: what is kept of the old mean at an update. Begins at 1. Part of the run: `state` goes into its checkpoint.
    Raises ValueError unless 0 < rho < 1: with 0 and one sample a bin r would be 1, and f-distill DMD.
    """

    def __init__(self, rho: float = 0.5, bins: int = BINS, device: torch.device | str = "cpu") -> None:
        if not 0 < rho < 1:
            raise ValueError(f"rho must be in (0, 1), got {rho}: 0 would make a bin's only sample 1, 1 learn nothing")
        self.rho = rho
        self.means = torch.ones(bins, dtype=torch.float32, device=device)

    @torch.no_grad()
    def normalised(self, r: Tensor, sigma: Tensor, total: Total) -> Tensor:
        """r [B] over the mean of its bin at sigma [B], after these samples, of all ranks, have entered the means."""
        count = len(self.means)
        index = (sigma.to(r.device, torch.float64) * count).long().clamp(0, count - 1)
        sums = torch.zeros(2, count, dtype=torch.float32, device=r.device)
        sums.index_add_(1, index, torch.stack([r.float(), torch.ones_like(r, dtype=torch.float32)]))
        sums, counts = total(sums)
        updated = self.rho * self.means + (1 - self.rho) * sums / counts.clamp_min(1)
        # a step whose numbers are not finite is skipped by the trainer: nothing of it may stay
        self.means = torch.where((counts > 0) & updated.isfinite(), updated, self.means)
        return r / self.means[index]

    def state(self) -> dict[str, Tensor]:
        return {"means": self.means.clone()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.means = state["means"].to(self.means)


@dataclass(frozen=True)
class RatioWeighting:
    """How ratios become weights of samples.

    divergence: whose h weighs them. total: sums over data-parallel ranks; it is a collective. bins: running means that
    ratios are divided by, None for none. clip: of logits and ratios.
    """

    divergence: Divergence
    total: Total
    bins: RatioBins | None = None
    clip: RatioClip = field(default_factory=RatioClip)


@torch.no_grad()
def f_weights(logits: Tensor, sigma: Tensor, weighting: RatioWeighting) -> tuple[Tensor, Tensor]:
    """(weights [B] of mean 1 over all ranks' samples, ratios r [B] as clipped). logits [B, K] at x_sigma, sigma [B]."""
    ratio, bins, total = density_ratio(logits, weighting.clip), weighting.bins, weighting.total
    weight = h(weighting.divergence, ratio if bins is None else bins.normalised(ratio, sigma, total))
    sums = total(torch.stack([weight.sum(), torch.full_like(weight[0], len(weight))]))
    return weight / (sums[0] / sums[1]).clamp_min(LEAST), ratio


def f_distill_loss(
    query: ScoreQuery,
    judge: Discriminator,
    weighting: RatioWeighting,
    *,
    gan_weight: float = 0.0,
    ratio: Tensor | None = None,
) -> LossOutput:
    """DMD with each sample's loss weighted by h(r) (theorem 1), and `gan_weight` times the student's GAN loss.

    One evaluation of the discriminator's backbone, at DMD's own x_sigma, gives ratio and GAN term.

    query: its weight is None, or what `f_weights` gave for these samples among others, where the global batch does not
        run at once.
    judge: trained with `Adversarial.softplus`, so that its logit is log r.
    weighting: how r becomes a weight, where the query has none.
    gan_weight: the weight of the GAN term beside DMD.
    ratio: [B], r of the query's weight, for the log; ValueError if only one of the two is told.
    """
    if (ratio is None) != (query.weight is None):
        raise ValueError("f-distill's weights come with their ratios: give the query's weight and ratio, or neither")
    with torch.set_grad_enabled(gan_weight > 0 and torch.is_grad_enabled()):
        logits = NoisedSamples.of(query.rollout, query.conditioning, query.sigma, query.noise).logits(judge)
    if ratio is None:
        weight, ratio = f_weights(logits, query.sigma, weighting)
        query = replace(query, weight=weight)
    assert query.weight is not None
    output = dmd_loss(query)
    output.metrics |= {"ratio": ratio.mean(), "weight_max": query.weight.max(), "weight_min": query.weight.min()}
    output.reduced |= {"weight_max": "max", "weight_min": "min"}
    gan = generator_terms(logits, None, Adversarial.softplus).mean()
    return with_term(output, LossOutput(gan, {"gan_loss": gan.detach()}), gan_weight) if gan_weight > 0 else output

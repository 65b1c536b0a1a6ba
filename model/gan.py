"""Adversarial losses on noised samples: DMD2's GAN term (arXiv 2405.14867, section 4.3), Self-Forcing's GAN
(2506.08009), relativistic pairing with R1 and R2 (R3GAN, 2501.05441), both by finite differences (APT, 2501.08316).

B batch  F latent frames  C channels  H W latent size  K logits of a sample
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import assert_never

import torch
import torch.nn.functional as functional
from torch import Tensor

from model.discriminator import Discriminator
from model.schedule import mix
from model.types import Conditioning, LossOutput, Rollout


class Adversarial(Enum):
    """softplus: non-saturating. relativistic: softplus of the difference to a real sample (arXiv 1807.00734).
    hinge: as ADD and LADD have it (2311.17042, eq. 2 and 3)."""

    softplus = "softplus"
    relativistic = "relativistic"
    hinge = "hinge"


@dataclass(frozen=True)
class Penalty:
    """Approximate gradient penalties: weight * mean (D(x_t) - D(x_t + a n))^2 at real (R1) and student samples (R2).

    r1, r2: weights, 0 for none. step: a; the *noised* sample is what is perturbed. per_step: divided by a^2, the square
    is on average |grad D|^2 whatever the step (Self-Forcing: a = 0.01); else it is a^2 of that (a = 0.1 elsewhere).
    """

    r1: float = 0.0
    r2: float = 0.0
    step: float = 0.1
    per_step: bool = False

    def __post_init__(self) -> None:
        if self.r1 < 0 or self.r2 < 0 or self.step <= 0:
            raise ValueError(f"r1 and r2 must be >= 0, step > 0, got {self.r1}, {self.r2} and {self.step}")


def generator_terms(fake: Tensor, real: Tensor | None, kind: Adversarial) -> Tensor:
    """The student's loss from logits [B, K], a mean over heads: [B]. real: needed by the relativistic kind alone."""
    match kind:
        case Adversarial.softplus:
            terms = functional.softplus(-fake)
        case Adversarial.relativistic:
            if real is None:
                raise ValueError("the relativistic loss compares with real samples, and got none")
            terms = functional.softplus(real - fake)
        case Adversarial.hinge:
            terms = -fake
        case _:
            assert_never(kind)
    return terms.mean(1)


def discriminator_terms(fake: Tensor, real: Tensor, kind: Adversarial) -> Tensor:
    """The discriminator's loss from logits [B, K], a mean over heads: [B]."""
    match kind:
        case Adversarial.softplus:
            terms = functional.softplus(fake) + functional.softplus(-real)
        case Adversarial.relativistic:
            terms = functional.softplus(fake - real)
        case Adversarial.hinge:
            terms = functional.relu(1 + fake) + functional.relu(1 - real)
        case _:
            assert_never(kind)
    return terms.mean(1)


@dataclass(frozen=True)
class NoisedSamples:
    """Samples as a discriminator judges them, of the student or of the data, at a draw of their own.

    x0: [B, F, C, H, W]. conditioning: what they are conditioned on. sigma: [B], noise levels. noise: like x0.
    """

    x0: Tensor
    conditioning: Conditioning
    sigma: Tensor
    noise: Tensor

    @classmethod
    def of(cls, rollout: Rollout, conditioning: Conditioning, sigma: Tensor, noise: Tensor) -> NoisedSamples:
        """The student's, without gradient in frames that no loss may judge: a discriminator sees them all."""
        if rollout.frame_mask is None:
            return cls(rollout.x0, conditioning, sigma, noise)
        mask = rollout.frame_mask.reshape(1, -1, 1, 1, 1)
        return cls(torch.where(mask, rollout.x0, rollout.x0.detach()), conditioning, sigma, noise)

    @property
    def x_sigma(self) -> Tensor:
        """[B, F, C, H, W]."""
        return mix(self.x0, self.noise, self.sigma)

    def detach(self) -> NoisedSamples:
        return replace(self, x0=self.x0.detach())

    def logits(self, judge: Discriminator, x_sigma: Tensor | None = None) -> Tensor:
        """D(x_sigma) [B, K]; of another x_sigma at the same noise levels, if it is told."""
        return judge.logits(self.x_sigma if x_sigma is None else x_sigma, self.sigma, self.conditioning)


def gradient_penalty(
    judge: Discriminator, samples: NoisedSamples, logits: Tensor, direction: Tensor, penalty: Penalty
) -> Tensor:
    """mean (D(x_sigma + a n) - D(x_sigma))^2 over heads (APT, arXiv 2501.08316), [B]; over a^2 if `penalty.per_step`.

    judge: the discriminator D.
    samples: where the slope is taken; their noised x_sigma [B, F, C, H, W] is what is moved.
    logits: D(x_sigma) [B, K].
    direction: n, standard normal, like x_sigma.
    penalty: a, and whether to divide by its square.
    """
    x_sigma = samples.x_sigma
    moved = samples.logits(judge, (x_sigma.float() + penalty.step * direction.float()).to(x_sigma.dtype))
    difference = (moved - logits) / (penalty.step if penalty.per_step else 1.0)
    return difference.square().mean(1)


def gan_loss(
    student: NoisedSamples,
    judge: Discriminator,
    *,
    kind: Adversarial = Adversarial.softplus,
    real: NoisedSamples | None = None,
) -> LossOutput:
    """The student's adversarial loss, mean softplus(-D(x_sigma)), at its own draw of sigma and noise, or at DMD's.

    Gradient flows through the backbone into the frames that a loss may judge; weights of backbone and heads must not
    require it here. real: for the relativistic kind, sample by sample.
    """
    fake_logits = student.logits(judge)
    with torch.no_grad():
        real_logits = real.logits(judge) if real is not None and kind is Adversarial.relativistic else None
    loss = generator_terms(fake_logits, real_logits, kind).mean()
    metrics = {"loss": loss.detach(), "gan_loss": loss.detach(), "fake_logit": fake_logits.detach().mean()}
    return LossOutput(loss, metrics)


def discriminator_loss(
    student: NoisedSamples,
    real: NoisedSamples,
    judge: Discriminator,
    *,
    kind: Adversarial = Adversarial.softplus,
    penalty: Penalty | None = None,
    real_step: Tensor | None = None,
    fake_step: Tensor | None = None,
) -> LossOutput:
    """mean softplus(D(x_sigma)) + softplus(-D(real_sigma)), and its penalties.

    Gradient reaches the heads and, where its weights require it, the backbone; never the student.

    student: the student's samples, detached here.
    real: the data's samples.
    judge: the discriminator D.
    kind: which adversarial loss is taken.
    penalty: weights of R1 and R2, and how they are taken; None for none.
    real_step, fake_step: standard normal, like x0, the directions of R1 and of R2; needed where their weight is not 0.
    """
    student = student.detach()
    fake_logits, real_logits = student.logits(judge), real.logits(judge)
    loss = discriminator_terms(fake_logits, real_logits, kind).mean()
    metrics = {
        "gan_loss": loss.detach(),
        "real_logit": real_logits.detach().mean(),
        "fake_logit": fake_logits.detach().mean(),
        "accuracy": 0.5 * ((real_logits > 0).float().mean() + (fake_logits < 0).float().mean()),
    }
    if penalty is not None and penalty.r1 > 0:
        assert real_step is not None
        r1 = gradient_penalty(judge, real, real_logits, real_step, penalty).mean()
        loss, metrics["r1"] = loss + penalty.r1 * r1, r1.detach()
    if penalty is not None and penalty.r2 > 0:
        assert fake_step is not None
        r2 = gradient_penalty(judge, student, fake_logits, fake_step, penalty).mean()
        loss, metrics["r2"] = loss + penalty.r2 * r2, r2.detach()
    return LossOutput(loss, metrics | {"loss": loss.detach()})


def with_term(main: LossOutput, term: LossOutput, weight: float) -> LossOutput:
    """main + weight * term, the metrics of both; what main calls loss is then the sum."""
    loss = main.loss + weight * term.loss
    metrics = term.metrics | main.metrics | {"loss": loss.detach()}
    return LossOutput(loss, metrics, main.kl_gradient, term.reduced | main.reduced)

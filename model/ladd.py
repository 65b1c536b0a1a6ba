"""Latent adversarial diffusion distillation (arXiv 2403.12015): the discriminator alone teaches the student.

Heads on features of the frozen teacher, at noised samples of the student and noised data. The discriminator's own loss
is `model.gan.discriminator_loss` with R1. What is LADD's own is where the samples are noised to.

B batch
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.discriminator import Discriminator
from model.gan import Adversarial, gan_loss
from model.types import Conditioning, LossOutput, Rollout


def ladd_sigma(normal: Tensor, *, mean: float = 1.0, std: float = 1.0) -> Tensor:
    """Logit-normal noise levels sigmoid(mean + std n), n standard normal [B], fp32 (section 3: high noise judges
    structure, low noise texture).

    Raises ValueError unless std is positive.
    """
    if std <= 0:
        raise ValueError(f"std of LADD's noise levels must be positive, got {std}")
    return torch.sigmoid(mean + std * normal.to(torch.float32))


def ladd_loss(
    rollout: Rollout,
    judge: Discriminator,
    conditioning: Conditioning,
    sigma: Tensor,
    noise: Tensor,
    *,
    kind: Adversarial = Adversarial.softplus,
) -> LossOutput:
    """The student's whole loss. judge: on the frozen teacher. sigma: [B], from `ladd_sigma` or the schedule's; noise:
    like x0. The paper's hinge is `kind` hinge."""
    return gan_loss(rollout, judge, conditioning, sigma, noise, kind=kind)

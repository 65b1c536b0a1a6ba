"""Latent adversarial diffusion distillation (arXiv 2403.12015): the discriminator alone teaches the student.

Heads on features of the frozen teacher, at noised samples of the student and noised data. The student's whole loss is
`model.gan.gan_loss` (the paper's kind is hinge), the discriminator's `model.gan.discriminator_loss` with R1. What is
LADD's own is where the samples are noised to.

B batch
"""

from __future__ import annotations

import torch
from torch import Tensor


def ladd_sigma(normal: Tensor, *, mean: float = 1.0, std: float = 1.0) -> Tensor:
    """Logit-normal noise levels sigmoid(mean + std n), n standard normal [B], fp32 (section 3: high noise judges
    structure, low noise texture).

    Raises ValueError unless std is positive.
    """
    if std <= 0:
        raise ValueError(f"std of LADD's noise levels must be positive, got {std}")
    return torch.sigmoid(mean + std * normal.to(torch.float32))

"""Many-step sampling of a bidirectional network: the teacher's, and the baseline a student is held against.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.score import ScoreNet


@torch.no_grad()
def euler_sample(
    net: ScoreNet, noise: Tensor, text: Tensor, negative: Tensor, sigmas: Sequence[float], guidance: float
) -> Tensor:
    """Integrates dx/dsigma = v from noise [B, F, C, H, W] at sigmas[0] down the given levels to 0 by Euler's method."""
    x = noise.float()
    for sigma, target in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
        level = torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
        x = x + (target - sigma) * net.guided_velocity(x, level, text, negative, guidance)
    return x

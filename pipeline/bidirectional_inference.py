"""Many-step sampling of a bidirectional network: the teacher's, and the baseline a student is held against.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from model.score import ScoreNet


@torch.no_grad()
def euler_trajectory(
    net: ScoreNet, noise: Tensor, text: Tensor, negative: Tensor, sigmas: Sequence[float], guidance: float
) -> Iterator[Tensor]:
    """Integrates dx/dsigma = v from noise [B, F, C, H, W] by Euler; yields x at each level, then at 0."""
    x = noise.float()
    for sigma, target in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
        yield x
        level = torch.full((x.shape[0],), sigma, dtype=torch.float32, device=x.device)
        x = x + (target - sigma) * net.guided_velocity(x, level, text, negative, guidance)
    yield x


def euler_sample(
    net: ScoreNet, noise: Tensor, text: Tensor, negative: Tensor, sigmas: Sequence[float], guidance: float
) -> Tensor:
    """The end of `euler_trajectory`: a sample [B, F, C, H, W]."""
    return deque(euler_trajectory(net, noise, text, negative, sigmas, guidance), maxlen=1).pop()

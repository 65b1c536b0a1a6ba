"""Reward-weighted distribution matching (arXiv 2512.04678): better samples count for more.

B batch
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.types import Total


@torch.no_grad()
def reward_weights(reward: Tensor, beta: float, total: Total) -> Tensor:
    """exp(r / beta) over its mean in the global batch: [B], fp32, detached; `dmd_loss` takes them as `weight`.

    reward: [B], of any callable, higher is better. total: sums over the ranks that hold different samples (a
    collective). Adding a constant to every reward changes nothing. Raises ValueError unless beta is positive.
    """
    if beta <= 0:
        raise ValueError(f"beta of the reward's weight exp(r / beta) must be positive, got {beta}")
    r = reward.double()
    count = torch.full_like(r[:1], len(r)).sum()
    sums = total(torch.stack([r.sum(), count]))
    # about the mean and bounded, so that no reward overflows: 600 is far beyond what leaves any other sample a weight
    weight = ((r - sums[0] / sums[1]) / beta).clamp_max(600).exp()
    return (weight * sums[1] / total(weight.sum())).float()

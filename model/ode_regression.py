"""ODE regression: a causal student learns a teacher's trajectories (CausVid, arXiv 2412.07772, section 4.3).

B batch  S stored points  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.types import LossOutput

SAME_LEVEL = 1e-3  # a whole timestep: files that keep timesteps round to it


def pick_stored(trajectory: Tensor, sigmas_S: Tensor, index_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Per-frame points of trajectories [B, S, F, C, H, W] and their noise levels: x [B, F, C, H, W], sigma [B, F]."""
    index = index_BF[:, None, :, None, None, None].expand(-1, 1, -1, *trajectory.shape[3:])
    return trajectory.gather(1, index).squeeze(1), sigmas_S[index_BF]


def ode_regression_loss(x0: Tensor, clean: Tensor, sigma_BF: Tensor) -> LossOutput:
    """mean (x0 - clean)^2 over the frames that were noisy; a frame given at sigma 0 has nothing to predict."""
    weight = (sigma_BF > 0).float()
    per_frame = (x0.float() - clean.float()).square().flatten(2).mean(2)
    per_sample = (per_frame * weight).sum(1) / weight.sum(1).clamp_min(1.0)
    loss = per_sample.mean()
    return LossOutput(loss, {"loss": loss.detach()})


def store_levels(sampler: tuple[float, ...], wanted: tuple[float, ...]) -> list[int]:
    """For each wanted noise level the nearest of the sampler's: the pair is stored with the level it really has."""
    levels = torch.tensor(sampler, dtype=torch.float64)
    return [int((levels - level).abs().argmin()) for level in wanted]


def lacking_levels(stored: Sequence[float], wanted: tuple[float, ...], sampler: tuple[float, ...]) -> tuple[float, ...]:
    """The wanted noise levels that none of the stored is as near to as the sampler's nearest (see `store_levels`)."""
    tolerances = [
        abs(sampler[i] - level) + SAME_LEVEL for i, level in zip(store_levels(sampler, wanted), wanted, strict=True)
    ]
    return tuple(
        level
        for level, tolerance in zip(wanted, tolerances, strict=True)
        if min(abs(kept - level) for kept in stored) > tolerance
    )

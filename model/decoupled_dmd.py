"""Decoupled DMD (arXiv 2511.22677): DMD's guided gradient in two terms, each with its own noise level.

F - T = (F - T_c) + (w - 1) (T_u - T_c) for T = T_u + w (T_c - T_u): the first matches distributions, the second drives
the sample along guidance ("CFG augmentation"). In DMD both are taken at one noised sample.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.dmd import kl_gradient, matching_loss, per_sample_mean
from model.query import ScoreQuery
from model.schedule import mix, velocity_to_x0
from model.types import LossOutput


def decoupled_dmd_loss(
    query: ScoreQuery, cfg_sigma: Tensor, cfg_noise: Tensor, *, cfg_weight: float = 1.0
) -> LossOutput:
    """1/2 mean (x - sg(x - g))^2, g = (F - T_c) / mean|x - T_c| + cfg_weight (w - 1) (T_u - T_c) / mean|x - T_c|.

    The first term is at the query's sigma and noise, the second at cfg_sigma [B] and cfg_noise, like x0; each is
    normalised where it is. With equal draws and cfg_weight 1 it is DMD's gradient, normalised by the unguided T_c in
    place of T. At w = 1 the second is nothing and costs nothing. `guidance.rescale` has no meaning for the two apart:
    ValueError.
    """
    guidance, conditioning = query.guidance, query.conditioning
    if guidance.rescale != 0.0:
        raise ValueError(f"decoupled DMD has no guided score to rescale: set guidance rescale {guidance.rescale} to 0")
    rollout, x0, sigma = query.rollout, query.rollout.x0, query.sigma
    with torch.no_grad():
        x_sigma = mix(x0, query.noise, sigma)
        fake_x0 = query.fake.guided_x0(x_sigma, sigma, conditioning, guidance.negative, guidance.fake)
        matching = kl_gradient(x0, fake_x0, query.real.x0(x_sigma, sigma, conditioning))
        augmentation = torch.zeros_like(matching)
        if guidance.real != 1.0 and cfg_weight != 0.0:
            x_cfg = mix(x0, cfg_noise, cfg_sigma)
            velocities = query.real.branches(x_cfg, cfg_sigma, conditioning, guidance.negative)
            cond, uncond = (velocity_to_x0(x_cfg, velocity, cfg_sigma) for velocity in velocities)
            augmentation = cfg_weight * (guidance.real - 1) * kl_gradient(x0, uncond, cond)
        gradient = matching + augmentation
    loss = matching_loss(x0, gradient, rollout.frame_mask, query.weight)
    norms = {"dmd_gradient_norm": gradient, "dm_gradient_norm": matching, "cfg_gradient_norm": augmentation}
    metrics = {name: per_sample_mean(value.square(), rollout.frame_mask).sqrt().mean() for name, value in norms.items()}
    return LossOutput(loss, metrics | {"loss": loss.detach()}, kl_gradient=gradient)

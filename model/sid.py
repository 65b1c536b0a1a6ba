"""Score identity distillation (arXiv 2404.04057; with guidance 2406.01561).

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from torch import Tensor

from model.dmd import Guidance, per_sample_mean, scored
from model.schedule import mix
from model.score import ScoreNet
from model.types import Conditioning, LossOutput, Rollout


def sid_loss(
    rollout: Rollout,
    real: ScoreNet,
    fake: ScoreNet,
    conditioning: Conditioning,
    guidance: Guidance,
    sigma: Tensor,
    noise: Tensor,
    *,
    alpha: float = 1.0,
) -> LossOutput:
    """mean (T - F) ((T - x) - alpha (T - F)) / sg(mean|x - T|), the mean of each sample its own.

    Gradient flows through x and through both scores' inputs; their weights must not require gradient, or the critic's
    would be computed for nothing. sigma: [B]; noise: like x0.
    """
    x0 = rollout.x0.float()
    x_sigma = mix(x0, noise, sigma)
    fake_x0, real_x0 = scored(real, fake, x_sigma, sigma, conditioning, guidance)
    gap = real_x0 - fake_x0
    scale = (x0 - real_x0).detach().abs().flatten(1).mean(1).reshape(-1, *(1,) * (x0.ndim - 1))
    loss = per_sample_mean(gap * ((real_x0 - x0) - alpha * gap) / scale, rollout.frame_mask).mean()
    metrics = {"loss": loss.detach(), "score_gap": gap.detach().abs().mean()}
    return LossOutput(loss, metrics)

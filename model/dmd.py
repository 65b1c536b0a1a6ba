"""Distribution matching distillation: DMD (arXiv 2311.18828), DMD2 (2405.14867); CausVid and Self-Forcing are the same
objective over other rollouts.

B batch  F latent frames  C channels  H W latent size  x the student's sample  g `kl_gradient`  sg stop-gradient
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.diffusion import flow_matching_loss
from model.query import ScoreQuery
from model.schedule import mix
from model.score import ScoreNet
from model.types import Conditioning, LossOutput, Rollout


def kl_gradient(x0: Tensor, fake_x0: Tensor, real_x0: Tensor) -> Tensor:
    """(fake_x0 - real_x0) / mean|x0 - real_x0| (DMD, eq. 7 and 8): [B, F, C, H, W], fp32.

    The mean runs over all elements of one sample, masked frames too.
    Non-finite values are left in: the trainer counts them and skips the step.
    """
    scale = (x0.float() - real_x0.float()).abs().flatten(1).mean(1)
    return (fake_x0.float() - real_x0.float()) / scale.reshape(-1, *(1,) * (x0.ndim - 1))


def per_sample_mean(x: Tensor, frame_mask: Tensor | None) -> Tensor:
    """[B] means over the frames of x [B, F, ...] that the mask [F] keeps."""
    return (x if frame_mask is None else x[:, frame_mask]).flatten(1).mean(1)


def matching_loss(x: Tensor, gradient: Tensor, frame_mask: Tensor | None, weight: Tensor | None = None) -> Tensor:
    """1/2 mean (x - sg(x - g))^2, where sg is stop-gradient (DMD, arXiv 2311.18828).

    Its gradient in x is g, divided by the number of unmasked elements and times each sample's weight; in masked frames
    it is 0.

    x, gradient: [B, F, ...].
    frame_mask: [F], the frames that count; None means all.
    weight: [B], each sample's weight, detached here; None is 1.
    """
    target = (x.float() - gradient).detach()
    per_sample = per_sample_mean((x.float() - target).square(), frame_mask)
    return 0.5 * (per_sample if weight is None else weight.detach() * per_sample).mean()


def dmd_loss(query: ScoreQuery) -> LossOutput:
    """1/2 mean (x - sg(x - g))^2 with g = `kl_gradient`: see `matching_loss` for its gradient.

    Both scores see the same x_sigma. Nothing is trained here but what made `query.rollout.x0`.
    """
    x0 = query.rollout.x0
    return matched(query, x0, mix(x0.detach(), query.noise, query.sigma))


def matched(query: ScoreQuery, x: Tensor, x_sigma: Tensor) -> LossOutput:
    """1/2 mean (x - sg(x - g))^2 with g = `kl_gradient` of rollout.x0 by the two scores at x_sigma, noised from x.

    x, x_sigma: [B, F, C, H, W], x_sigma without gradient at query.sigma; x is rollout.x0, or made of it.
    """
    rollout = query.rollout
    with torch.no_grad():
        fake_x0, real_x0 = scored(query, x_sigma)
        gradient = kl_gradient(rollout.x0, fake_x0, real_x0)
    loss = matching_loss(x, gradient, rollout.frame_mask, query.weight)
    metrics = {
        "loss": loss.detach(),
        "dmd_gradient_norm": per_sample_mean(gradient.square(), rollout.frame_mask).sqrt().mean(),
        "score_gap": per_sample_mean((fake_x0 - real_x0).abs(), rollout.frame_mask).mean(),
    }
    return LossOutput(loss, metrics, kl_gradient=gradient)


def scored(query: ScoreQuery, x_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x0 [B, F, C, H, W] as the fake and as the real score predict it at the same x_sigma, each with its guidance."""
    sigma, conditioning, guidance = query.sigma, query.conditioning, query.guidance
    fake_x0 = query.fake.guided_x0(x_sigma, sigma, conditioning, guidance.negative, guidance.fake)
    real_x0 = query.real.guided_x0(x_sigma, sigma, conditioning, guidance.negative, guidance.real, guidance.rescale)
    return fake_x0, real_x0


def critic_loss(
    rollout: Rollout,
    fake: ScoreNet,
    conditioning: Conditioning,
    sigma: Tensor,
    noise: Tensor,
    *,
    x0_target: bool = False,
) -> LossOutput:
    """Flow matching of the critic on the student's samples, conditional only, at its own draw (DMD2, arXiv 2405.14867).

    rollout: the student's sample x0 [B, F, C, H, W], detached here; frames outside its mask count for nothing.
    fake: the critic.
    conditioning: what the sample is conditioned on.
    sigma: [B], noise levels in [0, 1].
    noise: standard normal, like x0.
    x0_target: the error is that of x0 in place of the velocity's.
    """
    x0 = rollout.x0.detach()
    weight = None if rollout.frame_mask is None else rollout.frame_mask.expand(x0.shape[:2])
    return flow_matching_loss(
        lambda x, s: fake.velocity(x, s, conditioning), x0, noise, sigma, weight=weight, x0_target=x0_target
    )

"""Phased DMD (arXiv 2510.27684): each of several experts owns an interval of noise levels and is matched within it.

The student of an interval [s0, s1] makes x_{s0}, a noisy sample, so that the next expert can go on from there. Scores
are compared at x_s, s in (s0, 1], noised from x_{s0} on; what x_0 would be, nobody needs to know.

For x_s = (1 - s) x0 + s eps:   x_s | x_{s0} ~ k x_{s0} + t n,   k = (1 - s) / (1 - s0),   t^2 = s^2 - k^2 s0^2.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.dmd import matched, per_sample_mean
from model.query import ScoreQuery
from model.schedule import mix
from model.score import ScoreNet
from model.types import Conditioning, LossOutput, Rollout, expand_like


def phase_start(rollout: Rollout, start: float, noise: Tensor) -> Tensor:
    """x_{s0} [B, F, C, H, W] of the student's predicted x0, with fresh noise and with gradient."""
    return mix(rollout.x0, noise, torch.full(rollout.x0.shape[:1], start, device=rollout.x0.device))


def noised_on(x_start: Tensor, start: float, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_s ~ x_s | x_{s0}, in x_start's dtype; sigma: s [B], noise: like x_start. start 0 is `mix`.

    Raises ValueError for start outside [0, 1) or a sigma below it.
    """
    keep, added = _gains(start, expand_like(sigma, x_start))
    return (keep * x_start.float() + added * noise.float()).to(x_start.dtype)


def phased_dmd_loss(query: ScoreQuery, x_start: Tensor, start: float) -> LossOutput:
    """1/2 mean (x_{s0} - sg(x_{s0} - g))^2, g = (F - T) / mean|x0 - T| at x_s noised on from x_{s0}.

    x_start: x_{s0} with gradient, from `phase_start` or a solver's step; query.rollout.x0: what it was made from, for
    the normaliser alone. start 0 with x_start = rollout.x0 is `dmd_loss`. query.sigma: [B] in [start, 1].
    """
    return matched(query, x_start, noised_on(x_start.detach(), start, query.noise, query.sigma))


def phased_critic_loss(
    x_start: Tensor,
    start: float,
    fake: ScoreNet,
    conditioning: Conditioning,
    sigma: Tensor,
    noise: Tensor,
    *,
    frame_mask: Tensor | None = None,
) -> LossOutput:
    """mean ((t / s) (v - v*))^2 with v* = (s + (1 - s) s0^2 / (1 - s0)^2) n / t - x_{s0} / (1 - s0), at x_s.

    v* is the velocity whose score is that of x_s | x_{s0}; its mean given x_s is the velocity of the student's samples,
    so x_{s0} is enough. As t -> 0 it has no bound: t / s, 1 at start 0, takes that out. Start 0 is `critic_loss`.

    x_start: x_{s0} [B, F, C, H, W], detached here.
    start: s0, the interval's lower noise level in [0, 1).
    fake: the critic.
    conditioning: what the sample is conditioned on.
    sigma: s [B] in [start, 1].
    noise: n, standard normal, like x_start.
    frame_mask: [F] bool, the frames that count; None means all.
    """
    x_start = x_start.detach()
    s = expand_like(sigma, x_start)
    added = _gains(start, s)[1]
    velocity = fake.velocity(noised_on(x_start, start, noise, sigma), sigma, conditioning)
    share = added / s
    wanted = (1 + (1 - s) / s * (start / (1 - start)) ** 2) * noise.float() - share * x_start.float() / (1 - start)
    loss = per_sample_mean((share * velocity - wanted).square(), frame_mask).mean()
    return LossOutput(loss, {"loss": loss.detach()})


def _gains(start: float, s: Tensor) -> tuple[Tensor, Tensor]:
    """k and t of x_s | x_{s0}."""
    if not 0 <= start < 1:
        raise ValueError(f"an interval of noise levels must start in [0, 1), got {start}")
    keep = (1 - s) / (1 - start)
    if (lowest := float(s.min())) < start:
        raise ValueError(f"noise level {lowest:g} lies below its interval's start {start:g}: bound the schedule")
    return keep, (s.square() - (keep * start).square()).clamp_min(0).sqrt()

"""Inputs of causal training without rollouts: diffusion forcing and teacher forcing.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.score import Condition, ScoreNet
from model.types import Conditioning
from pipeline.causal import CausalConfig


def per_frame(values_Bb: Tensor, blocks: Sequence[int]) -> Tensor:
    """One value a block, [B, blocks], repeated for each of its frames: [B, F]."""
    sizes = torch.tensor(list(blocks), device=values_Bb.device)
    return values_Bb.repeat_interleave(sizes, dim=1)


def teacher_forced_velocity(
    net: ScoreNet,
    x: Tensor,
    sigma_BF: Tensor,
    clean: Tensor,
    clean_sigma_BF: Tensor,
    given: Condition,
    causal: CausalConfig,
    *,
    negative: Tensor | None = None,
    guidance: float = 1.0,
    start: int = 0,
) -> Tensor:
    """Velocity [B, F, C, H, W] of noisy frames x, each block looking back at the clean ones (CausVid, section 4.1).

    One pass over [clean | noisy], both halves at their RoPE positions. clean_sigma_BF: the clean half's own time;
    0 unless it is noise-augmented. guidance: w of uncond + w (cond - uncond), which needs the negative text [B, L, D].
    start: the video's frame at which x starts; clean starts at its first, and may lack the last block, which nobody
    looks back at.
    """
    kept, total = clean.shape[1], start + x.shape[1]
    condition = Conditioning.of(given)
    if condition.channels is not None:
        halves = condition.frames(0, kept).channels, condition.frames(start, x.shape[1]).channels
        condition = replace(condition, channels=torch.cat([half for half in halves if half is not None], 1))
    if guidance != 1.0 and negative is None:
        raise ValueError(f"guidance {guidance} needs the negative prompt's text")
    velocity = net.guided_velocity(
        torch.cat([clean, x], 1),
        torch.cat([clean_sigma_BF, sigma_BF], 1),
        condition,
        condition.text if negative is None else negative,
        guidance,
        positions=[*range(kept), *range(start, total)],
        mask=causal.teacher_forcing_mask(total).among([*range(kept), *range(total + start, 2 * total)]),
    )
    return velocity[:, kept:]

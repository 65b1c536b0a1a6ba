"""Inputs of causal training without rollouts: diffusion forcing and teacher forcing.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.score import Condition, ScoreNet
from model.types import Conditioning, Prompt
from pipeline.causal import CausalConfig


def per_frame(values_Bb: Tensor, blocks: Sequence[int]) -> Tensor:
    """One value a block, [B, blocks], repeated for each of its frames: [B, F]."""
    sizes = torch.tensor(list(blocks), device=values_Bb.device)
    return values_Bb.repeat_interleave(sizes, dim=1, output_size=sum(blocks))  # known, so nothing waits to count it


@dataclass(frozen=True)
class CleanContext:
    """The clean half of a teacher-forced pass: what noisy blocks look back at.

    latents: [B, Fc, C, H, W] from the video's first frame on. The last block may be missing: no block looks back at it.
    sigma_BF: their own time [B, Fc], 0 unless they are noise-augmented.
    start: the video's frame at which the noisy half starts.
    """

    latents: Tensor
    sigma_BF: Tensor
    start: int = 0


def teacher_forced_velocity(
    net: ScoreNet,
    x: Tensor,
    sigma_BF: Tensor,
    context: CleanContext,
    condition: Condition,
    causal: CausalConfig,
    *,
    negative: Prompt | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Velocity [B, F, C, H, W] of noisy frames, each block looking back at the clean ones (CausVid, section 4.1).

    One pass over [clean | noisy], both halves at their RoPE positions.

    net: any velocity network that takes masks.
    x: noisy frames [B, F, C, H, W].
    sigma_BF: their noise levels [B, F].
    context: the clean half, and where x starts.
    condition: conditioning of the whole video, or its text alone.
    causal: blocks and window.
    negative: the encoded negative prompt, for guidance.
    guidance: w of uncond + w (cond - uncond).
    Raises ValueError if w != 1 and `negative` is None.
    """
    start, kept, total = context.start, context.latents.shape[1], context.start + x.shape[1]
    condition = Conditioning.of(condition)
    if condition.channels is not None:
        halves = condition.frames(0, kept).channels, condition.frames(start, x.shape[1]).channels
        condition = replace(condition, channels=torch.cat([half for half in halves if half is not None], 1))
    if guidance != 1.0 and negative is None:
        raise ValueError(f"guidance {guidance} needs the negative prompt's text")
    velocity = net.guided_velocity(
        torch.cat([context.latents, x], 1),
        torch.cat([context.sigma_BF, sigma_BF], 1),
        condition,
        condition.prompt if negative is None else negative,
        guidance,
        positions=[*range(kept), *range(start, total)],
        mask=causal.teacher_forcing_mask(total).among([*range(kept), *range(total + start, 2 * total)]),
    )
    return velocity[:, kept:]

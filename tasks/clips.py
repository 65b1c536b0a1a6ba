"""Real videos as a task hands them out, and a look at samples in passing.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.types import VisualConditioning
from utils.metrics import clipped_share

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Glimpse:
    """pixels: [B, t, 3, h, w] in [0, 1]. clipped: [B], the share of them that a clamp put there."""

    pixels: Tensor
    clipped: Tensor

    @classmethod
    def of(cls, pixels: Tensor) -> Glimpse:
        """Of pixels before their clamp."""
        return cls(pixels.clamp(0, 1), clipped_share(pixels))


@dataclass(frozen=True)
class Clips:
    """Real videos as latents [B, F, C, H, W], their captions, and what networks are given of them."""

    latents: Tensor
    captions: list[str]
    visual: VisualConditioning = VisualConditioning()

    def start(self, frames: int, device: torch.device) -> Clips:
        """Their first frames, with the latents on `device`."""
        channels = self.visual.channels if self.visual.channels is None else self.visual.channels[:, :frames]
        latents = self.latents[:, :frames].to(device)
        return replace(self, latents=latents, visual=replace(self.visual, channels=channels))

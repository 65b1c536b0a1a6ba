"""Real videos as a task hands them out, and a quick look at samples.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.types import VisualConditioning
from utils.metrics import clipped_share


@dataclass(frozen=True)
class Glimpse:
    """How samples look.

    pixels: [B, t, 3, h, w] in [0, 1].
    clipped: [B], the share of a sample's pixels that a clamp moved into [0, 1].
    """

    pixels: Tensor
    clipped: Tensor

    @classmethod
    def of(cls, pixels: Tensor) -> Glimpse:
        """A glimpse of pixels that have not been clamped."""
        return cls(pixels.clamp(0, 1), clipped_share(pixels))


@dataclass(frozen=True)
class Clips:
    """Real videos as latents [B, F, C, H, W], their captions, and the visual conditioning made of them."""

    latents: Tensor
    captions: list[str]
    visual: VisualConditioning = VisualConditioning()

    def start(self, frames: int, device: torch.device) -> Clips:
        """Their first frames, with the latents on `device`."""
        channels = self.visual.channels if self.visual.channels is None else self.visual.channels[:, :frames]
        latents = self.latents[:, :frames].to(device)
        return replace(self, latents=latents, visual=replace(self.visual, channels=channels))

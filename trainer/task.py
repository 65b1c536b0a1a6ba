"""What a run generates: prompts, real latents, text embeddings, and the way from latents to pixels.

B batch  F latent frames  C channels  H W latent size
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from configs.schema import DataConfig
from model.types import Conditioning
from model.wan.config import WanConfig
from model.wan.text_encoder import toy_text_encoder
from utils.config import ConfigError
from utils.data.prompts import PromptStream, load_prompts
from utils.data.toy_world import ToyWorld


class ToyTask:
    """The toy world behind the interface of a real task: everything by position, nothing by state."""

    def __init__(self, config: DataConfig, geometry: WanConfig, seed: int, device: torch.device) -> None:
        self.world = ToyWorld(config.toy)
        self.device = device
        self.latent_shape = self.world.latent_shape
        channels = self.latent_shape[1]
        if geometry.in_dim != channels or geometry.out_dim != channels:
            raise ConfigError(
                f"student: in_dim {geometry.in_dim} does not fit the toy world's {channels} latent channels"
            )
        self.encoder = toy_text_encoder(self.world.captions, geometry.text_len, geometry.text_dim, config.text_seed)
        self.encoder.to(device)
        self.may_use_data = config.real
        self.negative_prompt = config.negative_prompt
        try:
            geometry.tokens_per_frame(*self.latent_shape[2:])
            self.library = load_prompts(config.prompts) if config.prompts else self.world.captions
            for prompt in self.library:
                self.world.parse(prompt)
            self.encoder.encode([self.negative_prompt])
        except (ValueError, OSError) as problem:
            raise ConfigError(f"data: {problem}") from None
        self.stream = PromptStream(len(self.library), seed)

    def prompts(self, positions: range) -> list[str]:
        """Training prompts at these positions of the endless shuffled library."""
        return [self.library[i] for i in self.stream.indices(positions.start, len(positions))]

    def real(self, positions: range) -> tuple[Tensor, list[str]]:
        """Real latents [B, F, C, H, W] at these positions, with their captions. RuntimeError in a data-free run."""
        if not self.may_use_data:
            raise RuntimeError("a data-free run asked for real videos")
        batch = self.world.batch(positions, "train")
        return batch.latents_BFCHW.to(self.device), batch.captions

    def conditioning(self, prompts: Sequence[str], initial: Tensor | None = None) -> Conditioning:
        return Conditioning(self.encoder.encode(prompts).to(self.device), initial)

    def negative(self, batch: int) -> Tensor:
        """The negative prompt's embedding [B, L, D]."""
        return self.encoder.encode([self.negative_prompt]).to(self.device).expand(batch, -1, -1)

    def validation_prompts(self, count: int) -> list[str]:
        """A fixed spread over the library."""
        return [self.library[(i * len(self.library)) // count % len(self.library)] for i in range(count)]

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, T, 3, h, w] in [0, 1]."""
        return self.world.decode(latents.float().cpu())

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] of pixels [B, T, C, h, w] in [0, 1]."""
        return self.world.encode(pixels).to(self.device)

    def reencode(self, latents: Tensor) -> Tensor:
        """The last frame of latents [B, F, C, H, W], decoded and encoded again as an image: [B, 1, C, H, W]."""
        return self.encode(self.decode(latents)[:, -1:])

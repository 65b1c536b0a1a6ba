"""Wan's codecs behind the seam: the VAE, CLIP, and the channels that image-to-video networks see."""

from __future__ import annotations

import torch
from torch import Tensor

from model.codec import VAEConfig
from model.folders import part_folder, read_config
from model.wan.image_encoder import ImageEncoder, check_image_encoder, image_channels, load_image_encoder
from model.wan.vae import STRIDE_T, WanVAE, load_vae, vae_channels


class WanCodecs:
    """Diffusers' AutoencoderKLWan, and CLIP beside it."""

    time_stride = STRIDE_T
    identity = False

    def fps(self, latent_channels: int) -> int:
        """16, and 24 for Wan2.2's 5B, which alone has latents of 48 channels (arXiv 2503.20314, Wan2.2's configs)."""
        return 24 if latent_channels == 48 else 16

    def load(self, config: VAEConfig, device: torch.device) -> WanVAE:
        return load_vae(config, device)

    def channels(self, config: VAEConfig) -> int:
        return vae_channels(config)

    def spatial(self, path: str) -> int:
        return int(read_config(part_folder(path, "vae"), "AutoencoderKLWan").get("scale_factor_spatial", 8))

    def statistics(self, path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        found = read_config(part_folder(path, "vae"), "AutoencoderKLWan")
        return tuple(found["latents_mean"]), tuple(found["latents_std"])

    def load_image_encoder(self, path: str, dtype: torch.dtype, device: torch.device) -> ImageEncoder:
        return load_image_encoder(path, dtype, device)

    def check_image_encoder(self, path: str) -> None:
        check_image_encoder(path)

    def image_channels(self, codec: WanVAE, pixels: Tensor, frames: int) -> Tensor:
        return image_channels(codec, pixels, frames)

    def channels_of(self, latents: Tensor) -> Tensor:
        """[B, F, 4 + C, H, W]. The mask comes first: 1 for the first latent frame, 0 for the others."""
        mask = torch.zeros_like(latents[:, :, :1]).expand(-1, -1, STRIDE_T, -1, -1).clone()
        mask[:, 0] = 1
        return torch.cat([mask, latents], 2)

    def latents_of(self, channels: Tensor) -> Tensor:
        return channels[:, :, STRIDE_T:]

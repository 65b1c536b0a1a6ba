"""The codec that a data section names, and whether it fits the networks."""

from __future__ import annotations

import torch

from model.codec import Codec, Codecs, VAEConfig
from utils.data.tensors import Statistics
from utils.errors import UserError


def statistics_of(codecs: Codecs, config: VAEConfig) -> Statistics | None:
    """Mean and deviation of the raw latents of a config's VAE, for files that hold those; None without a VAE."""
    if config.path is None:
        return None
    return Statistics(*codecs.statistics(config.path))


def fitting_vae(codecs: Codecs, config: VAEConfig, channels: int, device: torch.device) -> Codec:
    """The VAE of a config, for networks of so many latent channels. Raises UserError."""
    try:
        vae = codecs.load(config, device)
        check_channels(config, vae.channels, channels)
        return vae
    except (ValueError, OSError) as problem:
        raise UserError(f"data.{problem}") from None


def check_channels(config: VAEConfig, found: int, channels: int) -> None:
    """Raises ValueError for a codec of another number of latent channels than the networks'."""
    if found != channels:
        raise ValueError(f"vae: {config.path} has {found} channels, the networks {channels}: give theirs")

"""Codecs, which make latents of pixels and pixels of latents, as the rest of the project sees them.

B batch  F latent frames  C channels  H W latent size  T pixel frames  h w pixel size
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from utils.fields import check_modes
from utils.limits import check_video
from utils.precision import Dtype


@dataclass
class VAEConfig:
    """path: the VAE of the networks' family: its folder, a pipeline's with a folder `vae`, or a Hub name.

    tiny_decoder: taehv's file for Wan (taew2_1.pth), which decodes instead, faster and coarser; None for none.
    dtype: in which it computes. tiled: decode in overlapping tiles of 256 pixels, for less memory.
    """

    path: str | None = None
    tiny_decoder: str | None = None
    dtype: Dtype = Dtype.bf16
    tiled: bool = False

    def __post_init__(self) -> None:
        check_modes(self)
        if self.tiled and self.tiny_decoder:
            raise ValueError("tiled is for the VAE's own decoder: set it to false, or tiny_decoder to null")


@dataclass
class ClipConfig:
    """frames, height, width: of a latent video; the defaults are 81 frames of 480x832 pixels through Wan2.1's VAE."""

    frames: int = 21
    height: int = 60
    width: int = 104

    def __post_init__(self) -> None:
        check_video(self)


class Codec(Protocol):
    """A frozen codec.

    channels: of its latents.
    spatial: pixels a side of one latent place.
    mean, scale: latents are (raw - mean) * scale, [C, 1, 1].
    """

    channels: int
    spatial: int
    mean: Tensor
    scale: Tensor

    @property
    def device(self) -> torch.device: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, F, C, H, W] of pixels [B, T, 3, h, w] in [0, 1]. Raises ValueError for a size it cannot take."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, T, 3, h, w] in [0, 1] of latents [B, F, C, H, W]."""
        ...

    def decoding(self) -> Callable[[Tensor], Tensor]:
        """Decodes one video block by block, each block after those before it."""
        ...


class ImageEncoder(Protocol):
    """What makes tokens of an image for networks with an `image_dim`: width [Di]."""

    @property
    def width(self) -> int: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """Tokens [B, Li, Di] of images [B, 3, h, w] in [0, 1]."""
        ...


class Codecs(Protocol):
    """The codecs of a family.

    time_stride: pixel frames that each latent frame but the first stands for.
    identity: whether latents are pixels, so that nothing is stored and nothing is loaded.
    """

    time_stride: int
    identity: bool

    def fps(self, latent_channels: int) -> int:
        """Frames a second of the videos that models on latents of so many channels make."""
        ...

    def load(self, config: VAEConfig, device: torch.device) -> Codec:
        """The codec that a config names. Raises ValueError or OSError."""
        ...

    def channels(self, config: VAEConfig) -> int:
        """Its latent channels, by its config.json alone. Raises ValueError or OSError."""
        ...

    def spatial(self, path: str) -> int:
        """Pixels a side of one latent place, by its config.json alone. Raises ValueError or OSError."""
        ...

    def statistics(self, path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of its raw latents' channels, by its config.json alone. Raises ValueError or OSError."""
        ...

    def load_image_encoder(self, path: str, dtype: torch.dtype, device: torch.device) -> ImageEncoder:
        """The image encoder beside it. Raises ValueError or OSError."""
        ...

    def check_image_encoder(self, path: str) -> None:
        """Raises ValueError or OSError where there is none."""
        ...

    def image_channels(self, codec: Codec, pixels: Tensor, frames: int) -> Tensor:
        """Channels [B, F, Cc, H, W] beside the latents of a video of `frames` latent frames.

        pixels: its first frames [B, T, 3, h, w] or [B, 3, h, w] in [0, 1]; later ones are grey.
        """
        ...

    def channels_of(self, latents: Tensor) -> Tensor:
        """The same channels from the latents [B, F, C, H, W] of a first frame with grey ones behind it."""
        ...

    def latents_of(self, channels: Tensor) -> Tensor:
        """The latents in those channels: the inverse of `channels_of`."""
        ...


class PixelCodec:
    """Pixels as their own latents, (pixels - mean) * scale: a codec of stride 1 that has no weights.

    mean, scale: a number for each channel. device: where they are.
    """

    spatial = 1

    def __init__(self, mean: Sequence[float], scale: Sequence[float], device: torch.device) -> None:
        self.channels = len(mean)
        self.mean, self.scale = (torch.tensor(values, device=device)[:, None, None] for values in (mean, scale))

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def encode(self, pixels: Tensor) -> Tensor:
        if pixels.shape[2] != self.channels:
            raise ValueError(f"pixels have {pixels.shape[2]} channels, these networks take {self.channels}")
        return (pixels.to(self.device).float() - self.mean) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return (latents.float() / self.scale + self.mean).clamp(0, 1)

    def decoding(self) -> Callable[[Tensor], Tensor]:
        return self.decode


class PixelCodecs:
    """For families that generate pixels. A VAE, an image encoder and first frames are refused: ValueError, one line.

    mean, scale: latents are (pixels - mean) * scale, a number for each channel.
    """

    time_stride = 1
    identity = True

    def __init__(self, mean: Sequence[float], scale: Sequence[float]) -> None:
        self.mean, self.scale = tuple(mean), tuple(scale)

    def fps(self, latent_channels: int) -> int:
        raise ValueError("no released model of this family makes videos: set validation.fps")

    def load(self, config: VAEConfig, device: torch.device) -> PixelCodec:
        self._refuse(config.path)
        return PixelCodec(self.mean, self.scale, device)

    def channels(self, config: VAEConfig) -> int:
        self._refuse(config.path)
        return len(self.mean)

    def spatial(self, path: str) -> int:
        return PixelCodec.spatial

    def statistics(self, path: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self.mean, tuple(1 / scale for scale in self.scale)

    def load_image_encoder(self, path: str, dtype: torch.dtype, device: torch.device) -> ImageEncoder:
        raise ValueError(f"{path}: these networks see no image encoder's tokens: leave it out")

    def check_image_encoder(self, path: str) -> None:
        raise ValueError(f"{path}: these networks see no image encoder's tokens: leave it out")

    def image_channels(self, codec: Codec, pixels: Tensor, frames: int) -> Tensor:
        raise ValueError("these networks are not given first frames")

    def channels_of(self, latents: Tensor) -> Tensor:
        raise ValueError("these networks are not given first frames")

    def latents_of(self, channels: Tensor) -> Tensor:
        raise ValueError("these networks are not given first frames")

    def _refuse(self, path: str | None) -> None:
        if path is not None:
            raise ValueError(f"vae: these networks generate pixels and have no VAE, but {path} is given: leave it out")

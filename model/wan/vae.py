"""Wan's VAE: pixels <-> normalised latents, a block of frames at a time. Diffusers' AutoencoderKLWan does the work.

The VAE of Wan 2.1 (16 channels, 8 x 8 pixels a place) and of 2.2 TI2V-5B (48 channels, 16 x 16) are causal in time:
the first latent frame stands for one frame and each other one for four, T = 4 (F - 1) + 1. A stream keeps what every
causal convolution saw last, so that blocks give the very bits of the whole clip (arXiv 2503.20314, section 4.1).
"""

# B batch  F f latent frames  C channels  H W latent size  T t pixel frames  h w pixel size

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from model.codec import VAEConfig
from model.folders import load_whole, part_folder, read_config
from model.wan.tiny_decoder import TinyDecoder, load_tiny_decoder

STRIDE_T = 4  # frames of every latent frame but the first
Z_DIM = 16  # latent channels where a config.json does not say
TILE, TILE_STRIDE = 256, 192  # pixels; Diffusers' own, so that tiles are where its tiles are


class WanVAE:
    """A frozen VAE. `decoding` and `encoding` start streams; `decode` and `encode` are one call of one.

    model: Diffusers' AutoencoderKLWan. tiny: decodes in its place. Raises ValueError where the two do not fit.
    """

    def __init__(self, model: Any, *, tiled: bool = False, tiny: TinyDecoder | None = None) -> None:
        config = model.config
        self.model = model.eval().requires_grad_(False)
        self.tiled, self.tiny = tiled, tiny
        self.channels: int = config.z_dim
        self.patch: int = config.patch_size or 1
        self.spatial: int = config.scale_factor_spatial
        if (real := self.patch * 2 ** (len(config.dim_mult) - 1)) != self.spatial:
            raise ValueError(f"vae: config.json says scale_factor_spatial {self.spatial}, its layers make it {real}")
        if tiny is not None and (tiny.channels, 8 * tiny.patch) != (self.channels, self.spatial):
            raise ValueError(
                f"vae: the tiny decoder is for {tiny.channels} channels at 1/{8 * tiny.patch} of the size, the VAE "
                f"has {self.channels} at 1/{self.spatial}: give taehv's file for this Wan"
            )
        self.mean = torch.tensor(config.latents_mean, dtype=torch.float32).view(-1, 1, 1)
        # Diffusers multiplies by the reciprocal, and divides by it: so do we, for the same bits
        self.scale = 1.0 / torch.tensor(config.latents_std, dtype=torch.float32).view(-1, 1, 1)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    def to(self, device: torch.device | str) -> WanVAE:
        self.model.to(device)
        if self.tiny is not None:
            self.tiny.to(device)
        self.mean, self.scale = self.mean.to(device), self.scale.to(device)
        return self

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a clip of `frames` frames of `height` x `width` pixels. Raises ValueError."""
        if frames < 1 or frames % STRIDE_T != 1:
            near = max(frames - 1, 0) // STRIDE_T * STRIDE_T + 1
            raise ValueError(f"vae: {frames} frames: give 4 n + 1 of them, such as {near} or {near + STRIDE_T}")
        if min(height, width) < 1 or height % self.spatial or width % self.spatial:
            raise ValueError(f"vae: frames of {height} x {width} pixels: give multiples of {self.spatial}")
        return (frames - 1) // STRIDE_T + 1, self.channels, height // self.spatial, width // self.spatial

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels [B, T, 3, h, w] in [0, 1], fp32, of latents [B, F, C, H, W]."""
        return self.decoding()(latents)

    def encode(self, pixels: Tensor) -> Tensor:
        """Latents [B, F, C, H, W], fp32, of pixels [B, T, 3, h, w] in [0, 1]: the posterior's mean.

        Raises ValueError for a clip that the VAE has no latents of.
        """
        return self.encoding()(pixels)

    def decoding(self) -> Callable[[Tensor], Tensor]:
        """A new stream: blocks of latents [B, f, C, H, W] in, in order; pixels [B, t, 3, h, w] out."""
        if self.tiny is not None:
            return self.tiny.stream()
        return DecodeStream(self)

    def encoding(self) -> EncodeStream:
        """A new stream: blocks of pixels [B, t, 3, h, w] in, in order; latents [B, f, C, H, W] out."""
        return EncodeStream(self)


class _Causal:
    """The decoder's or encoder's pass over one stream of frames: what its causal convolutions saw last is kept."""

    def __init__(self, net: Any) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        self._net = net
        self._seen: list[Any] = [None] * sum(isinstance(module, WanCausalConv3d) for module in net.modules())

    def __call__(self, x: Tensor, **options: bool) -> Tensor:
        out: Tensor = self._net(x, feat_cache=self._seen, feat_idx=[0], **options)
        return out


class DecodeStream:
    """A decode in progress. See WanVAE.decoding."""

    def __init__(self, vae: WanVAE) -> None:
        self.vae = vae
        self._passes: dict[tuple[int, int], _Causal] = {}  # by the tile's corner
        self._shape: torch.Size | None = None
        self._begun = False

    def __call__(self, latents: Tensor) -> Tensor:
        """Raises ValueError for a block of another size than the stream's first."""
        vae, shape = self.vae, latents[:, 0].shape
        if latents.ndim != 5 or latents.shape[2] != vae.channels or shape != (self._shape or shape):
            expected = list(self._shape or ("B", vae.channels, "H", "W"))
            raise ValueError(f"vae: latents {list(latents.shape)} do not fit [B, F, C, H, W] with {expected} a frame")
        self._shape = shape
        z_BFCHW = latents.to(vae.device, torch.float32) / vae.scale + vae.mean
        z_BCFHW = z_BFCHW.transpose(1, 2).to(vae.dtype)
        out = self._tiled(z_BCFHW) if vae.tiled else self._plain(z_BCFHW, (0, 0))
        self._begun = True
        pixels = rearrange(out, "b (c q p) t h w -> b t c (h p) (w q)", p=vae.patch, q=vae.patch)
        return pixels.float().clamp(-1, 1) / 2 + 0.5

    def _plain(self, z_BCFHW: Tensor, corner: tuple[int, int]) -> Tensor:
        """The decoder's own output, frame by frame as Diffusers decodes: [B, 3 patch^2, t, h / patch, w / patch]."""
        decoder = self._passes.setdefault(corner, _Causal(self.vae.model.decoder))
        x = self.vae.model.post_quant_conv(z_BCFHW)
        frames = [decoder(x[:, :, i : i + 1], first_chunk=i == 0 and not self._begun) for i in range(x.shape[2])]
        return torch.cat(frames, dim=2)

    def _tiled(self, z_BCFHW: Tensor) -> Tensor:
        """Each tile decoded for itself, its edges blended into its neighbours'."""
        ratio = self.vae.spatial
        tile, stride, pixels = TILE // ratio, TILE_STRIDE // ratio, ratio // self.vae.patch
        height, width = z_BCFHW.shape[3:]
        if max(height, width) <= tile:
            return self._plain(z_BCFHW, (0, 0))
        overlap, kept = (tile - stride) * pixels, stride * pixels
        rows, above = [], None
        for top in range(0, height, stride):
            row: list[Tensor] = []
            for left in range(0, width, stride):
                part = self._plain(z_BCFHW[..., top : top + tile, left : left + tile], (top, left))
                if above is not None:
                    part = _blend(above[len(row)], part, overlap, dim=-2)
                if row:
                    part = _blend(row[-1], part, overlap, dim=-1)
                row.append(part)
            rows.append(torch.cat([part[..., :kept, :kept] for part in row], dim=-1))
            above = row
        return torch.cat(rows, dim=-2)[..., : height * pixels, : width * pixels]


def _blend(before: Tensor, after: Tensor, overlap: int, dim: int) -> Tensor:
    """`after`, its first `overlap` places along `dim` fading in from the last ones of `before`."""
    overlap = min(overlap, before.shape[dim], after.shape[dim])
    steps = [step / overlap for step in range(overlap)]
    view = [-1 if axis == dim else 1 for axis in range(-after.ndim, 0)]
    fade_in, fade_out = (
        torch.tensor(weights, dtype=after.dtype, device=after.device).view(view)
        for weights in (steps, [1 - step for step in steps])
    )
    old = before.narrow(dim, before.shape[dim] - overlap, overlap)
    new = after.narrow(dim, 0, overlap)
    rest = after.narrow(dim, overlap, after.shape[dim] - overlap)
    return torch.cat([old * fade_out + new * fade_in, rest], dim=dim)


class EncodeStream:
    """An encode in progress. See WanVAE.encoding."""

    def __init__(self, vae: WanVAE) -> None:
        self.vae = vae
        self._pass = _Causal(vae.model.encoder)
        self._begun = False

    def __call__(self, pixels: Tensor) -> Tensor:
        """The first block has 4 n + 1 frames, later ones 4 n. Raises ValueError for another number, or size."""
        vae = self.vae
        if pixels.ndim != 5 or pixels.shape[2] != 3:
            raise ValueError(f"vae: pixels must be [B, T, 3, h, w], got {list(pixels.shape)}")
        frames = pixels.shape[1]
        vae.latent_shape(frames + self._begun, *pixels.shape[3:])
        x = pixels.to(vae.device, torch.float32).transpose(1, 2) * 2 - 1
        x = rearrange(x.to(vae.dtype), "b c t (h p) (w q) -> b (c q p) t h w", p=vae.patch, q=vae.patch)
        starts = range(0 if self._begun else 1, frames, STRIDE_T)
        chunks = [x[:, :, start : start + STRIDE_T] for start in starts]
        if not self._begun:
            chunks.insert(0, x[:, :, :1])
        self._begun = True
        moments = vae.model.quant_conv(torch.cat([self._pass(chunk) for chunk in chunks], dim=2))
        mean_BFCHW = moments[:, : vae.channels].transpose(1, 2).float()
        return (mean_BFCHW - vae.mean) * vae.scale


def check_vae(config: VAEConfig) -> Path:
    """The folder of the VAE that a config names. Raises ValueError, one line, for one that is none."""
    if config.path is None:
        raise ValueError("vae: path is null: give the folder of an AutoencoderKLWan or of a pipeline, or a Hub name")
    folder = part_folder(config.path, "vae")
    read_config(folder, "AutoencoderKLWan")
    return folder


def vae_channels(config: VAEConfig) -> int:
    """Latent channels of the VAE that a config names, by its config.json. Raises ValueError."""
    return int(read_config(check_vae(config), "AutoencoderKLWan").get("z_dim", Z_DIM))


def load_vae(config: VAEConfig, device: torch.device | str = "cpu") -> WanVAE:
    """The VAE that a config names. Raises ValueError, one line, for what is no whole AutoencoderKLWan."""
    folder = check_vae(config)
    tiny = load_tiny_decoder(config.tiny_decoder, config.dtype.torch) if config.tiny_decoder else None
    return WanVAE(_load(folder, config.dtype.torch), tiled=config.tiled, tiny=tiny).to(device)


def _load(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKLWan

    # low_cpu_mem_usage: else it warns where accelerate is not installed
    return load_whole(AutoencoderKLWan, folder, "vae", torch_dtype=dtype, low_cpu_mem_usage=False)

"""Discriminators: heads over features of a score network (DMD2, arXiv 2405.14867, section 4.3; LADD, 2403.12015).

B batch  F latent frames  C channels  H W latent size  d channels of a feature  h w its size  K logits of a sample
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from model.score import ScoreNet
from model.types import Conditioning

DEPTHS = (0.5, 0.75, 0.99)
SMALLEST = 4  # an image feature is halved down to 4 x 4, then judged whole


def tapped_blocks(layers: int, depths: Sequence[float] = DEPTHS) -> tuple[int, ...]:
    """The blocks at these shares of the depth, counted from 0, each once: 30 layers give 15, 22, 29.

    Raises ValueError for a share outside [0, 1).
    """
    if not depths or any(not 0 <= depth < 1 for depth in depths):
        raise ValueError(f"depths of the discriminator's features must be shares in [0, 1), got {list(depths)}")
    return tuple(sorted({int(depth * layers) for depth in depths}))


class Discriminator:
    """Logits of a noised sample: `heads` over what `blocks` of `backbone` put out there.

    backbone: teacher (frozen) or critic (trained with the heads where its weights require gradient).
    heads: one module for all features, list of [B, F, d, h, w] -> logits [B, K]; it runs in its own precision.
    """

    def __init__(self, backbone: ScoreNet, heads: nn.Module, blocks: Sequence[int]) -> None:
        self.backbone, self.heads, self.blocks = backbone, heads, tuple(blocks)

    def logits(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """[B, K], fp32, at x [B, F, C, H, W] noised to sigma [B]; positive is real. One evaluation of the backbone."""
        features = self.backbone.features(x, sigma, conditioning, self.blocks)
        dtype = next(self.heads.parameters()).dtype
        out: Tensor = self.heads([feature.to(dtype) for feature in features])
        return out.float()


def group_norm(channels: int) -> nn.GroupNorm:
    """As many groups, up to 32, as divide the channels into at least 4 each: on one position a group of one channel
    would be normalised to zero, and what is before it would never learn."""
    groups = max(n for n in range(1, 33) if channels % n == 0 and (channels // n >= 4 or n == 1))
    return nn.GroupNorm(groups, channels)


class VideoHead(nn.Module):
    """One logit from a DiT's tokens: unpatchified to [B, d / patch, F, H, W], strided Conv3d, GroupNorm, LeakyReLU,
    pointwise Conv3d, mean over positions. Padding lets every frame be seen, of an odd number and of one too."""

    def __init__(self, dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        width = dim // patch**2
        self.conv = nn.Conv3d(width, width, (2, 4, 4), stride=2, padding=1)
        self.norm = group_norm(width)
        self.out = nn.Conv3d(width, 1, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens [B, F, d, h, w] -> [B]."""
        x = functional.pixel_shuffle(tokens, self.patch).transpose(1, 2)
        x = functional.leaky_relu(self.norm(self.conv(x)), 0.2)
        return self.out(x).flatten(1).mean(1)  # type: ignore[no-any-return]


class VideoHeads(nn.Module):
    """A `VideoHead` for each of `count` features. Raises ValueError unless patches of `patch` x `patch` share `dim`."""

    def __init__(self, dim: int, count: int, patch: int = 2) -> None:
        super().__init__()
        if dim % patch**2:
            raise ValueError(f"tokens of width {dim} cannot be unpatchified {patch}x{patch}: use the register head")
        self.heads = nn.ModuleList(VideoHead(dim, patch) for _ in range(count))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return _head_logits(self.heads, features)


class RegisterHead(nn.Module):
    """One logit from learned registers that read each feature's tokens by cross-attention (Self-Forcing's GAN): what
    they read, side by side -> LayerNorm, Linear, SiLU, Linear.

    Raises ValueError unless `heads` divides `dim`.
    """

    def __init__(self, dim: int, count: int, heads: int = 1, registers: int = 1) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} attention heads do not divide the tokens' width {dim}")
        self.heads = heads
        self.registers = nn.ParameterList(nn.Parameter(torch.randn(registers, dim)) for _ in range(count))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(count))
        self.keys_values = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(count))
        self.outs = nn.ModuleList(nn.Linear(dim, dim) for _ in range(count))
        width = count * registers * dim
        self.judge = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, 1))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """List of [B, F, d, h, w] -> [B, 1]."""
        summaries = [self._attend(index, feature) for index, feature in enumerate(features)]
        return self.judge(torch.cat(summaries, 1).flatten(1))  # type: ignore[no-any-return]

    def _attend(self, index: int, feature: Tensor) -> Tensor:
        """What the registers [B, R, d] of this feature [B, F, d, h, w] read from its tokens."""
        tokens = self.norms[index](feature.movedim(2, -1).flatten(1, 3))  # [B, L, d]
        query = self.registers[index].expand(len(tokens), -1, -1)
        key_value = self.keys_values[index](tokens).chunk(2, -1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, *key_value))
        attended = functional.scaled_dot_product_attention(q, k, v)
        return query + self.outs[index](attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class ImageHead(nn.Module):
    """One logit from an image feature: [Conv4 s2, GroupNorm, SiLU] down to 4 x 4, Conv4, GroupNorm, SiLU, Conv1.

    Raises ValueError unless `size` is 4 times a power of 2.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        halvings = (size // SMALLEST).bit_length() - 1
        if size != SMALLEST << max(halvings, 0):
            raise ValueError(f"an image feature of size {size} cannot be halved to {SMALLEST}: use 4, 8, 16, 32, ...")
        layers: list[nn.Module] = []
        for _ in range(halvings):
            layers += [nn.Conv2d(channels, channels, 4, stride=2, padding=1), group_norm(channels), nn.SiLU()]
        layers += [nn.Conv2d(channels, channels, SMALLEST), group_norm(channels), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(channels, 1, 1))

    def forward(self, feature: Tensor) -> Tensor:
        """[B, F, d, h, h] -> [B], the mean over the images where there are several."""
        return self.layers(feature.flatten(0, 1)).reshape(feature.shape[:2]).mean(1)  # type: ignore[no-any-return]


class ImageHeads(nn.Module):
    """An `ImageHead` for each feature, given as (channels, size)."""

    def __init__(self, features: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(ImageHead(channels, size) for channels, size in features)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return _head_logits(self.heads, features)


def _head_logits(heads: nn.ModuleList, features: Sequence[Tensor]) -> Tensor:
    """Logits [B, K], one a head and feature."""
    return torch.stack([head(feature) for head, feature in zip(heads, features, strict=True)], 1)

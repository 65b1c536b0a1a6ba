"""The network F of EDM (arXiv 2206.00364, eq. 7), class-conditional: its path (model/path.py) does the preconditioning.

B batch  F frames  C channels  H W image size  h w size of the grid  d width  K labels  N = B * F images
Frames are folded into the batch: each is an image of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from model.edm.config import GROUP, EDMConfig
from model.family import Network


class Block(nn.Module):
    """x + conv(silu((1 + scale) norm(conv(silu(norm(x)))) + shift)), scale and shift made of time and label (ADM's
    adaptive group norm, arXiv 2105.05233). The second convolution begins at zero, so a new block changes nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(dim // GROUP, dim)
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.GroupNorm(dim // GROUP, dim, affine=False)
        self.conv2 = zeroed(nn.Conv2d(dim, dim, 3, padding=1))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """x [N, d, h, w], modulation [N, 2 d] in fp32 -> [N, d, h, w]."""
        scale, shift = modulation[..., None, None].chunk(2, 1)
        y = self.norm2(self.conv1(functional.silu(self.norm1(x))))
        return x + self.conv2(functional.silu((1 + scale) * y + shift))  # type: ignore[no-any-return]


class EDMNetwork(Network):
    """An input convolution, blocks on one grid, an output convolution that begins at zero."""

    def __init__(self, config: EDMConfig) -> None:
        super().__init__()
        self.config = config
        pixels = config.patch**2
        self.conv_in = nn.Conv2d(config.in_dim * pixels, config.dim, 3, padding=1)
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, config.dim), nn.SiLU(), nn.Linear(config.dim, config.dim)
        )
        self.label_embedding = nn.Linear(config.labels, config.dim, bias=False)
        # the root's and not the blocks': sharding gathers those in the compute precision
        self.modulation = nn.Linear(config.dim, config.num_layers * 2 * config.dim)
        self.blocks = nn.ModuleList(Block(config.dim) for _ in range(config.num_layers))
        self.norm_out = nn.GroupNorm(config.dim // GROUP, config.dim)
        self.conv_out = zeroed(nn.Conv2d(config.dim, config.out_dim * pixels, 3, padding=1))

    def fsdp_units(self) -> list[nn.Module]:
        return list(self.blocks)

    def forward(
        self, x: Tensor, time: Tensor, label: Tensor, *, features: Sequence[int] | None = None
    ) -> Tensor | list[Tensor]:
        """F [B, F, C, H, W] at x; with `features` a list of what these blocks put out [B, F, d, h, w] in its place.

        x: [B, F, C, H, W], scaled to unit variance.
        time: c_noise = ln(q) / 4, [B] or one a frame [B, F].
        label: [B, K], one-hot, or zeros for no label.
        features: blocks, rising from 0; later ones do not run.
        Raises ValueError for tensors of another geometry, and for blocks that there are not.
        """
        self._check(x, time, label, features)
        batch, frames = x.shape[:2]
        modulation = fp32_linear(self.modulation, self._embedded(time, label, frames)).chunk(len(self.blocks), 1)
        y = self.conv_in(functional.pixel_unshuffle(x.flatten(0, 1), self.config.patch))
        tapped: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            y = block(y, modulation[number])
            if features is not None and number in features:
                tapped.append(y.unflatten(0, (batch, frames)))
                if number == features[-1]:
                    return tapped
        out = self.conv_out(functional.silu(self.norm_out(y)))
        return functional.pixel_shuffle(out, self.config.patch).unflatten(0, (batch, frames))

    def _embedded(self, time: Tensor, label: Tensor, frames: int) -> Tensor:
        """Time and label of each image [N, d], fp32."""
        half = self.config.freq_dim // 2
        cycles = 2.0 ** torch.linspace(-3, 3, half, device=time.device)  # time spans about 2.7 units
        angle = 2 * math.pi * (time[:, None] if time.ndim == 1 else time).float()[..., None] * cycles
        first, _, second = self.time_embedding
        wave = torch.cat([angle.cos(), angle.sin()], -1)
        of_time = fp32_linear(second, functional.silu(fp32_linear(first, wave)))  # [B, F or 1, d]
        both = of_time + fp32_linear(self.label_embedding, label)[:, None]
        return functional.silu(both).expand(-1, frames, -1).flatten(0, 1)

    def _check(self, x: Tensor, time: Tensor, label: Tensor, features: Sequence[int] | None) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[2] != config.in_dim:
            raise ValueError(f"x must be [B, F, {config.in_dim}, H, W], got {list(x.shape)}")
        config.tokens_per_frame(*x.shape[3:])
        batch, frames = x.shape[:2]
        if time.shape not in ((batch,), (batch, frames)):
            raise ValueError(f"time must be [{batch}] or [{batch}, {frames}], got {list(time.shape)}")
        if label.shape != (batch, config.labels):
            raise ValueError(f"label must be [{batch}, {config.labels}], one-hot or zeros, got {list(label.shape)}")
        if features is not None and not is_rising(features, config.num_layers):
            raise ValueError(f"features must rise within the {config.num_layers} blocks from 0, got {list(features)}")


def is_rising(numbers: Sequence[int], end: int) -> bool:
    """Whether these are different numbers of 0 .. end - 1 in order, one at least."""
    return len(numbers) > 0 and list(numbers) == sorted(set(numbers) & set(range(end)))


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def fp32_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer in fp32, whatever its weights are stored in and whatever autocast says."""
    assert isinstance(layer, nn.Linear)
    with torch.autocast(x.device.type, enabled=False):
        bias = None if layer.bias is None else layer.bias.float()
        return functional.linear(x.float(), layer.weight.float(), bias)

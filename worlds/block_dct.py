"""A fixed code in place of a VAE: the DCT of blocks of 8 x 8 pixels, of which the low frequencies are kept.

Each pixel's colours are turned to three orthonormal axes: grey, red against blue, and green against both. Of each
block, the axes keep 21, 15 and 10 frequencies: those with u + v <= 5, 4 and 3. So a latent pixel has 46 channels.
`decode` is the pseudo-inverse of `encode`: encoding what it gives changes nothing. Of the world's videos the code keeps
all but an error of 36 dB.

A network of width D cannot pass on noise of more than D dimensions, and a token of 8 x 8 pixels in colour has 192: what
it leaves behind stays as noise in each sample. 46 leave room in a narrow network for what it computes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

BLOCK: Final = 8  # pixels a side
AXES: Final = (  # rows are orthonormal
    (1 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)),
    (1 / math.sqrt(2), 0.0, -1 / math.sqrt(2)),
    (-1 / math.sqrt(6), 2 / math.sqrt(6), -1 / math.sqrt(6)),
)
KEPT: Final = (5, 4, 3)  # of each axis: the largest u + v
SPREAD: Final = (
    0.7,
    0.42,
    0.29,
)  # by what an axis' frequencies are divided: as it varies, for latents of deviation 0.8
GREY: Final = 0.87  # mean of the world's pixels


class BlockDCT:
    """Pixels [B, F, 3, H, W] <-> latents [B, F, 46, H / 8, W / 8].

    Elementwise sums in a fixed order: a matrix product may round differently in another batch size.
    """

    def __init__(self) -> None:
        self._rows = _basis()
        self._frequencies = [
            [(u, v) for u in range(most + 1) for v in range(most + 1 - u)] for most in KEPT
        ]  # of each axis: along x, along y
        self.channels = sum(map(len, self._frequencies))

    def encode(self, pixels_BFCHW: Tensor) -> Tensor:
        """Latents of pixels in [0, 1]."""
        blocks = pixel_unshuffle(pixels_BFCHW.float() - GREY, BLOCK).unflatten(2, (3, BLOCK, BLOCK))
        colours = blocks.unbind(2)  # three of [B, F, y, x, H / 8, W / 8]
        channels = []
        for axis, frequencies, spread in zip(AXES, self._frequencies, SPREAD, strict=True):
            columns = _weighted(colours, axis).unbind(3)
            along_x = [_weighted(columns, self._rows[u]).unbind(2) for u in range(frequencies[-1][0] + 1)]
            channels += [_weighted(along_x[u], self._rows[v]) * (_raised(u + v) / spread) for u, v in frequencies]
        return torch.stack(channels, dim=2)

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Pixels, not clamped."""
        axes = [
            self._blocks(part.unbind(2), frequencies, spread)
            for part, frequencies, spread in zip(
                latents_BFCHW.float().split(list(map(len, self._frequencies)), dim=2),
                self._frequencies, SPREAD, strict=True,
            )
        ]  # fmt: skip
        colours = [_weighted(axes, [axis[colour] for axis in AXES]) for colour in range(3)]
        return pixel_shuffle(torch.cat(colours, dim=2), BLOCK) + GREY

    def _blocks(self, channels: Sequence[Tensor], frequencies: Sequence[tuple[int, int]], spread: float) -> Tensor:
        """[B, F, 64, H / 8, W / 8]: a colour axis at each pixel of a block, row by row."""
        waves = range(frequencies[-1][0] + 1)
        pixels = []
        for y in range(BLOCK):
            along_x = []
            for wave in waves:
                found = [
                    (c, spread / _raised(u + v), v)
                    for c, (u, v) in zip(channels, frequencies, strict=True)
                    if u == wave
                ]
                along_x.append(_weighted([c for c, _, _ in found], [size * self._rows[v][y] for _, size, v in found]))
            pixels += [_weighted(along_x, [self._rows[u][x] for u in waves]) for x in range(BLOCK)]
        return torch.stack(pixels, dim=2)


def _basis() -> list[list[float]]:
    """The orthonormal DCT-II: [frequency][pixel]."""
    scale = [math.sqrt((1 if u == 0 else 2) / BLOCK) for u in range(BLOCK)]
    return [[scale[u] * math.cos(math.pi * (2 * x + 1) * u / (2 * BLOCK)) for x in range(BLOCK)] for u in range(BLOCK)]


def _raised(n: int) -> float:
    """By what frequencies u + v = n are raised. In the world of shapes they vary by the square of it less than a
    block's mean, so this is half way, on a logarithmic scale, from pixels' own weights to equal variances."""
    return math.sqrt(1 + 0.75 * n + 0.42 * n * n)


def _weighted(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value * weight
    return total

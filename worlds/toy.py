"""A toy text-to-video world with known ground truth: a handwritten digit glides over a small torus.

Real 8x8 digits (scikit-learn's bundled set: no download) move at constant speed over a 16x16 canvas, placed with
sub-pixel bilinear weights. The caption names the digit and the direction; the handwriting, the start and the offset
across the motion are left to chance, so there is something to be diverse about.

The canvas is a torus: a digit that leaves on one side comes in on the other, so "moving left" stays true at any length
and every frame carries the same ink. With the default speed and 9 frames no digit reaches an edge.

Space-to-depth by 2 stands in for the VAE: pixels [B, F, 1, 16, 16] <-> latents [B, F, 4, 8, 8].
"""

# B batch  F frames  C channels  H W size (pixels or latents)  K uniform draws

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from utils.limits import FRAMES, SIDE, VOLUME, check_counts
from worlds.glyphs import DIGIT_WORDS, GLYPH, Split, check_draws, glyph_indices, glyphs, uniform

DIRECTIONS: Final = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y) of one step, y downwards
PIXEL_MEAN: Final = 0.08  # latents are (pixel - mean) / std: about zero mean and unit variance
PIXEL_STD: Final = 0.22
_STREAMS: Final = {"train": 0, "test": 1, "real": 2}


@dataclass
class ToyWorldConfig:
    """Geometry and randomness of the world. Lengths in pixels, speed in pixels a frame.

    frames: of a video.
    seed: of the draws of digit, direction, handwriting and place.
    canvas: side of the square torus.
    speed: of the digit.
    start: the digit begins U(0, start) from the edge it moves away from.
    across: its offset from the middle, perpendicular to the motion, is U(-across, across); it decides how hard the
        world is.
    """

    frames: int = 9
    seed: int = 0
    canvas: int = 16
    speed: float = 0.75
    start: float = 2.0
    across: float = 2.5

    def __post_init__(self) -> None:
        slack = self.canvas - GLYPH
        check_counts(self, {"frames": FRAMES, "canvas": 2 * SIDE})
        if self.frames * (self.canvas // 2) ** 2 > VOLUME:
            raise ValueError(
                f"toy world: {self.frames} frames of canvas {self.canvas} have more than {VOLUME} tokens: lower one"
            )
        if self.canvas % 4 or slack < 0:
            raise ValueError(f"toy world: canvas must be a multiple of 4 and at least {GLYPH}, got {self.canvas}")
        if not 0 < self.speed < self.canvas / 4:
            raise ValueError(f"toy world: speed must be in (0, {self.canvas / 4}) pixels a frame, got {self.speed}")
        if not 0 <= self.start <= slack:
            raise ValueError(f"toy world: start must be in [0, {slack}] pixels, got {self.start}")
        if not 0 <= self.across <= slack / 2:
            raise ValueError(f"toy world: across must be in [0, {slack / 2}] pixels, got {self.across}")


@dataclass(frozen=True)
class ToySample:
    """One video: latents [F, C, H, W] and what is true of it."""

    latents_FCHW: Tensor
    caption: str
    digit: int
    direction: str


@dataclass(frozen=True)
class ToyBatch:
    """Videos as latents [B, F, C, H, W] in fp32, and their captions."""

    latents_BFCHW: Tensor
    captions: list[str]


class ToyWorld:
    """Makes samples on the fly; each is a pure function of (config, split, index) and does not depend on its batch."""

    def __init__(self, config: ToyWorldConfig) -> None:
        self.config = config
        self.side = config.canvas  # pixels
        self.latent_shape: tuple[int, ...] = (config.frames, 4, config.canvas // 2, config.canvas // 2)
        self.captions = [self.caption(digit, direction) for digit in range(10) for direction in DIRECTIONS]

    def caption(self, digit: int, direction: str) -> str:
        """The only sentence for this content: "the digit seven moving left"."""
        return f"the digit {DIGIT_WORDS[digit]} moving {direction}"

    def parse(self, caption: str) -> tuple[int, str]:
        """(digit, direction) of a caption; the inverse of `caption`. Raises ValueError on any other sentence."""
        match caption.lower().split():
            case ["the", "digit", word, "moving", direction] if word in DIGIT_WORDS and direction in DIRECTIONS:
                return DIGIT_WORDS.index(word), direction
        raise ValueError(
            f"toy world: cannot read caption {caption!r}; write 'the digit D moving V', "
            f"D one of {', '.join(DIGIT_WORDS)}, V one of {', '.join(DIRECTIONS)}"
        )

    def sample(self, index: int, split: Split) -> ToySample:
        """The sample with this index (any integer >= 0) of "train" or "test" (held-out handwriting)."""
        batch = self.batch([index], split)
        digit, direction = self.parse(batch.captions[0])
        return ToySample(batch.latents_BFCHW[0], batch.captions[0], digit, direction)

    def resized(self, frames: int, height: int) -> ToyWorld:
        """The same world with so many frames, and with latents of this height; itself if it has both already."""
        config = replace(self.config, frames=frames, canvas=2 * height)
        return self if config == self.config else ToyWorld(config)

    def batch(self, indices: Sequence[int], split: Split) -> ToyBatch:
        """The samples with these indices. Raises ValueError on an unknown split or a negative index."""
        check_draws("toy world", indices, split)
        u_BK = uniform([self.config.seed, _STREAMS[split]], np.asarray(indices, dtype=np.uint64), draws=5)
        names = list(DIRECTIONS)
        digits = [int(u * 10) for u in u_BK[:, 0]]
        directions = [names[int(u * len(names))] for u in u_BK[:, 1]]
        captions = [self.caption(digit, direction) for digit, direction in zip(digits, directions, strict=True)]
        return ToyBatch(self._render(digits, directions, u_BK[:, 2:], split), captions)

    def real_videos_for(self, captions: Sequence[str], seed: int, split: Split = "test") -> Tensor:
        """Real latents [B, F, C, H, W] that fit these captions: what a perfect generator could have made.

        Handwriting is held-out unless `split` says "train". `seed` picks the draws, which differ from `sample`'s.
        """
        check_draws("toy world", (), split)
        digits, directions = zip(*(self.parse(caption) for caption in captions), strict=True)
        key = [self.config.seed, _STREAMS["real"], _STREAMS[split], seed]
        u_BK = uniform(key, np.arange(len(captions), dtype=np.uint64), draws=3)
        return self._render(digits, directions, u_BK, split)

    def encode(self, pixels_BFCHW: Tensor) -> Tensor:
        """Pixels in [0, 1], grey or RGB (its channels are averaged), to latents. Raises ValueError on another shape."""
        channels, height, width = pixels_BFCHW.shape[2:]
        if channels not in (1, 3) or (height, width) != (self.config.canvas, self.config.canvas):
            side = self.config.canvas
            raise ValueError(
                f"toy world: pixels must be [B, F, 1 or 3, {side}, {side}], got {list(pixels_BFCHW.shape)}"
            )
        grey = pixels_BFCHW.float().mean(dim=2, keepdim=True)
        return pixel_unshuffle((grey - PIXEL_MEAN) / PIXEL_STD, 2)

    def decode(self, latents_BFCHW: Tensor, *, clamp: bool = True) -> Tensor:
        """Latents to grey-as-RGB pixels [B, F, 3, H, W], in [0, 1] unless `clamp` is off."""
        pixels = pixel_shuffle(latents_BFCHW.float(), 2) * PIXEL_STD + PIXEL_MEAN
        return (pixels.clamp(0, 1) if clamp else pixels).expand(-1, -1, 3, -1, -1)

    def _render(
        self, digits: Sequence[int], directions: Sequence[str], u_BK: NDArray[np.float64], split: Split
    ) -> Tensor:
        """Latents of this content; u_BK [B, 3] chooses the handwriting, the start and the offset across."""
        pools = [glyph_indices(split)[digit] for digit in digits]
        glyphs_BHW = glyphs()[[pool[int(u * len(pool))] for pool, u in zip(pools, u_BK[:, 0], strict=True)]]
        offset_BFxy = _offsets(self.config, np.array([DIRECTIONS[d] for d in directions]).reshape(-1, 2), u_BK[:, 1:])
        return self.encode(_place(glyphs_BHW, torch.from_numpy(offset_BFxy), self.config.canvas).unsqueeze(2))


def _offsets(config: ToyWorldConfig, step_Bxy: NDArray[np.int64], u_BK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Top-left corners [B, F, (x, y)] in pixels, not yet wrapped onto the torus."""
    middle = (config.canvas - GLYPH) / 2
    along = u_BK[:, :1] * config.start - middle  # from the middle, in the direction of motion
    across = (2 * u_BK[:, 1:] - 1) * config.across
    travelled_BF = along + config.speed * np.arange(config.frames)
    perpendicular = np.abs(step_Bxy[:, ::-1])
    return middle + travelled_BF[..., None] * step_Bxy[:, None] + (across * perpendicular)[:, None]


def _place(glyphs_BHW: Tensor, offset_BFxy: Tensor, canvas: int) -> Tensor:
    """Glyphs with their corner at a real-valued offset on a torus: frames [B, F, canvas, canvas], bilinear.

    Gathers and elementwise sums only: a matrix product may round differently in another batch size.
    """
    batch, frames = offset_BFxy.shape[:2]
    floor = offset_BFxy.floor()
    fraction = (offset_BFxy - floor).float()
    grid = torch.arange(canvas)
    source_BF2P = (grid - floor.long().unsqueeze(-1)) % canvas  # which glyph column (0) or row (1) lands on each pixel
    images = torch.zeros(batch, canvas, canvas)
    images[:, :GLYPH, :GLYPH] = glyphs_BHW
    images = images.unsqueeze(1).expand(batch, frames, canvas, canvas)
    for axis, dim in ((1, -2), (0, -1)):
        index = source_BF2P[:, :, axis].unsqueeze(-1 if dim == -2 else -2).expand(batch, frames, canvas, canvas)
        weight = fraction[..., axis, None, None]
        images = images.gather(dim, index) * (1 - weight) + images.gather(dim, (index - 1) % canvas) * weight
    return images

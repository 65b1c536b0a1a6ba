"""scikit-learn's digits as a text-to-image task: an image is a video of one frame.

The 8x8 grey glyphs as they are, without augmentation; a caption names the digit, the handwriting is left to chance.
Nothing stands in for a VAE: pixels [B, 1, 1, 8, 8] <-> latents of the same shape, about zero mean and unit variance.
"""

# B batch  F frames  C channels  H W size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worlds.glyphs import DIGIT_WORDS, GLYPH, Split, check_draws, glyph_indices, glyphs, uniform
from worlds.toy import ToyBatch

PIXEL_MEAN: Final = 0.305  # latents are (pixel - mean) / std
PIXEL_STD: Final = 0.376
_STREAMS: Final = {"train": 0, "test": 1, "real": 2}


@dataclass
class DigitsConfig:
    """seed: of the draws of digit and handwriting."""

    seed: int = 0


class DigitsWorld:
    """Each sample is a pure function of (config, split, index) and does not depend on its batch."""

    def __init__(self, config: DigitsConfig) -> None:
        self.config = config
        self.side = GLYPH
        self.latent_shape: tuple[int, ...] = (1, 1, GLYPH, GLYPH)
        self.captions = [self.caption(digit) for digit in range(10)]

    def caption(self, digit: int) -> str:
        """The only sentence for this digit: "a handwritten seven"."""
        return f"a handwritten {DIGIT_WORDS[digit]}"

    def parse(self, caption: str) -> int:
        """The digit of a caption; the inverse of `caption`. Raises ValueError on any other sentence."""
        match caption.lower().split():
            case ["a", "handwritten", word] if word in DIGIT_WORDS:
                return DIGIT_WORDS.index(word)
        raise ValueError(
            f"digits: cannot read caption {caption!r}; write 'a handwritten D', D one of {', '.join(DIGIT_WORDS)}"
        )

    def batch(self, indices: Sequence[int], split: Split) -> ToyBatch:
        """The samples with these indices, each digit as often as the others. Raises ValueError on an unknown split or a
        negative index."""
        check_draws("digits", indices, split)
        u_BK = uniform([self.config.seed, _STREAMS[split]], np.asarray(indices, dtype=np.uint64), draws=2)
        digits = [int(u * 10) for u in u_BK[:, 0]]
        return ToyBatch(self._images(digits, u_BK[:, 1], split), [self.caption(digit) for digit in digits])

    def real_videos_for(self, captions: Sequence[str], seed: int, split: Split = "test") -> Tensor:
        """Real latents [B, 1, 1, 8, 8] that fit these captions: what a perfect generator could have made.

        They are drawn with replacement, from held-out handwriting (397 glyphs) unless `split` says "train". `seed`
        picks the draws, which differ from those of `batch`.
        """
        check_draws("digits", (), split)
        key = [self.config.seed, _STREAMS["real"], _STREAMS[split], seed]
        u_B = uniform(key, np.arange(len(captions), dtype=np.uint64), draws=1)[:, 0]
        return self._images([self.parse(caption) for caption in captions], u_B, split)

    def every(self, split: Split) -> tuple[Tensor, Tensor]:
        """All glyphs of a split, each once: latents [N, 1, 1, 8, 8] and digits [N]."""
        pools = glyph_indices(split)
        digits = torch.tensor([digit for digit, pool in enumerate(pools) for _ in pool])
        return self.encode(glyphs()[[i for pool in pools for i in pool], None, None]), digits

    def encode(self, pixels_BFCHW: Tensor) -> Tensor:
        """Pixels in [0, 1], grey or RGB (its channels are averaged), to latents. Raises ValueError on another shape."""
        if pixels_BFCHW.shape[2] not in (1, 3) or tuple(pixels_BFCHW.shape[3:]) != (GLYPH, GLYPH):
            raise ValueError(f"digits: pixels must be [B, F, 1 or 3, {GLYPH}, {GLYPH}], got {list(pixels_BFCHW.shape)}")
        return (pixels_BFCHW.float().mean(dim=2, keepdim=True) - PIXEL_MEAN) / PIXEL_STD

    def decode(self, latents_BFCHW: Tensor, *, clamp: bool = True) -> Tensor:
        """Latents to grey-as-RGB pixels [B, F, 3, H, W], in [0, 1] unless `clamp` is off."""
        pixels = latents_BFCHW.float() * PIXEL_STD + PIXEL_MEAN
        return (pixels.clamp(0, 1) if clamp else pixels).expand(-1, -1, 3, -1, -1)

    def resized(self, frames: int, height: int) -> DigitsWorld:
        """Itself: there is one size. Raises ValueError for another."""
        if (frames, height) != (1, GLYPH):
            raise ValueError(f"digits: images are one frame of {GLYPH} x {GLYPH}, not {frames} of {height} x {height}")
        return self

    def _images(self, digits: Sequence[int], u_B: NDArray[np.float64], split: Split) -> Tensor:
        pools = [glyph_indices(split)[digit] for digit in digits]
        chosen = [pool[int(u * len(pool))] for pool, u in zip(pools, u_B, strict=True)]
        return self.encode(glyphs()[chosen, None, None])

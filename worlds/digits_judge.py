"""The judge of images of digits: a Frechet distance like FID, on a classifier that never saw a generator.

The published tables' FID compares 50 000 images on Inception's features; this one compares some hundreds on the
features of a small CNN trained on real handwriting. Only the formula is the same: the numbers are not comparable.
"""

# B batch  F frames  C channels  H W pixels  D features

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from utils.metrics import binomial_error, clipped_share, frechet_distance
from worlds.digit_net import DigitNet, check_samples, kept, relative_distance, relative_diversity, stored_at
from worlds.digits import DigitsWorld

# name -> (label, better), as of the toy world's judge
METRICS: Final = {
    "fid": ("FID-like, %", "low"),
    "digit_right": ("digit right", "high"),
    "diversity": ("diversity", "real"),
    "novelty": ("novelty", "real"),
    "intensity": ("intensity", "real"),
}
_SEED: Final = 201117
_REFERENCE_IMAGES: Final = 4000  # at least: real images behind the distance and the diversity
_FLOOR_DRAWS: Final = 5


@dataclass(frozen=True)
class _Reference:
    """Real training images of the evaluated captions, each repeated equally often, and the distance's floor."""

    features: Tensor  # [R, D]
    intensity: float
    floor: float
    floor_sd: float


class DigitsJudge:
    """Judges latents against captions, as `ToyJudge` does.

    It trains its CNN on all training glyphs on first use (CPU seconds) and keeps it in `cache_dir`.

    `accuracy`: share of the held-out glyphs whose digit it tells.
    """

    def __init__(self, world: DigitsWorld, cache_dir: str | Path) -> None:
        self.world = world
        self.path = stored_at(cache_dir, "digits_judge", world.config)
        self._net, self.accuracy = kept(self.path, world.side, lambda: _train(world))
        self._glyphs_ND = {split: world.every(split)[0].flatten(1) for split in ("train", "test")}  # type: ignore[arg-type]
        self._references: dict[tuple[str, ...], _Reference] = {}

    def evaluate(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Every measure of these images, by name. n >= 400 makes the Frechet distance worth reading.

        fid: Frechet distance of the images' features to those of real training images of the same captions, in percent
            of the real features' total variance; fid_raw: the same as it is. fid_floor: of as many real held-out
            images, what a perfect generator would score (mean of several draws, and their deviation *_sd).
        digit_right: share of images that are the caption's digit, with its binomial standard error *_se.
        diversity: mean feature distance between images of one caption, relative to real; nan if no caption is repeated.
        novelty: mean pixel distance to the nearest training glyph, relative to that of held-out glyphs: 1 is new
            handwriting, towards 0 are copies. A floor is no bound to copies: these score below it.
        intensity: mean pixel, with *_se; intensity_real: that of real images. clipped: share of values outside [0, 1].

        Raises ValueError if sizes disagree, fewer than 2 images are given, or latents are not finite.
        """
        self._check(latents_BFCHW, captions)
        latents = latents_BFCHW.detach().float().cpu()
        features, told = self._look(latents)
        right = (told == torch.tensor([self.world.parse(caption) for caption in captions])).double().mean().item()
        reference = self._reference(captions)
        pixels, count = self.world.decode(latents)[:, 0, 0].flatten(1).mean(1), len(captions)
        return {
            "fid": relative_distance(features, reference.features),
            "fid_raw": frechet_distance(features, reference.features),
            "fid_floor": reference.floor,
            "fid_floor_sd": reference.floor_sd,
            "digit_right": right,
            "digit_right_se": binomial_error(right, count),
            "diversity": relative_diversity(features, captions, reference.features),
            "novelty": self._novelty(latents),
            "intensity": pixels.mean().item(),
            "intensity_se": pixels.std().item() / math.sqrt(count),
            "intensity_real": reference.intensity,
            "clipped": clipped_share(self.world.decode(latents, clamp=False)).mean().item(),
            "videos": float(count),
        }

    def _check(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> None:
        shape = self.world.latent_shape
        if tuple(latents_BFCHW.shape[1:]) != shape:
            raise ValueError(
                f"digits judge: latents must be [B, {', '.join(map(str, shape))}], got {list(latents_BFCHW.shape)}"
            )
        check_samples("digits judge", latents_BFCHW, captions)

    @torch.no_grad()
    def _look(self, latents_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(features [B, D], digits [B]) of the images as they are shown: clamped to [0, 1]."""
        features = self._net(self.world.decode(latents_BFCHW)[:, 0, :1])
        return features, self._net.head(features).argmax(-1)

    def _novelty(self, latents_BFCHW: Tensor) -> float:
        train, test = self._glyphs_ND["train"], self._glyphs_ND["test"]
        shown = self.world.encode(self.world.decode(latents_BFCHW)).flatten(1)
        generated, real = (torch.cdist(images, train).amin(1).mean() for images in (shown, test))
        return (generated / real).item()

    def _reference(self, captions: Sequence[str]) -> _Reference:
        key = tuple(captions)
        if key not in self._references:
            repeats = math.ceil(_REFERENCE_IMAGES / len(captions))
            latents = self.world.real_videos_for(list(captions) * repeats, _SEED, "train")
            features = self._look(latents)[0]
            held_out = [self._look(self.world.real_videos_for(captions, _SEED + i))[0] for i in range(_FLOOR_DRAWS)]
            floors = torch.tensor([relative_distance(draw, features) for draw in held_out])
            intensity = self.world.decode(latents).mean().item()
            self._references[key] = _Reference(features, intensity, floors.mean().item(), floors.std().item())
        return self._references[key]


def _train(world: DigitsWorld) -> tuple[DigitNet, float]:
    """The network, and its accuracy on held-out handwriting."""
    latents, digits = world.every("train")
    net = DigitNet.trained(world.decode(latents)[:, 0, :1], digits)
    latents, digits = world.every("test")
    with torch.no_grad():
        told = net.head(net(world.decode(latents)[:, 0, :1])).argmax(-1)
    return net, (told == digits).double().mean().item()

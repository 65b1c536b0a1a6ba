"""The toy world's judge: measures videos by means that never saw a generator.

A small CNN trained on real frames tells the digit and gives appearance features; the ink's centroid, tracked on the
torus, gives direction, speed and jitter. Appearance, motion and intensity are reported apart: one distance over all of
them rewards dim, blurry videos.
"""

# B batch  F frames  C channels  H W pixels  D features  K classes

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from utils.metrics import binomial_error, clipped_share, drift, motion
from worlds.digit_net import DigitNet, check_samples, kept, relative_distance, relative_diversity, stored_at
from worlds.glyphs import Split
from worlds.toy import DIRECTIONS, ToyWorld

# name -> (label, better): what a metric table needs to know. "real" = the nearer to real videos' value the better.
METRICS: Final = {
    "prompt_right": ("prompt right", "high"),
    "digit_right": ("digit right", "high"),
    "direction_right": ("direction right", "high"),
    "appearance_fd": ("appearance FD, %", "low"),
    "motion_error": ("speed error, px/frame", "low"),
    "jitter": ("jitter, px", "low"),
    "flicker": ("flicker", "low"),
    "intensity": ("intensity", "real"),
    "diversity": ("diversity", "real"),
    "appearance_drift": ("appearance drift", "real"),
    "intensity_drift": ("intensity drift", "low"),
    "motion": ("motion", "real"),
}
_SEED: Final = 201117
_TRAINING_VIDEOS: Final = 4000
_ACCURACY_VIDEOS: Final = 2000
_REFERENCE_VIDEOS: Final = 2000  # at least: real videos behind the Frechet distance and the diversity
_FLOOR_DRAWS: Final = 5
_CHUNK: Final = 256  # videos a forward


@dataclass(frozen=True)
class _Reference:
    """Real training videos of the evaluated captions, each repeated equally often, and the distance's floor."""

    features: Tensor  # [R, D]
    ink: Tensor  # [R, F]
    floor: float
    floor_sd: float
    drift: float
    motion: float


class ToyJudge:
    """Judges latents against captions. Trains its CNN on first use (CPU seconds, fixed seed, global random state
    untouched) and keeps it in `cache_dir`, so that every row of a table comes from the same judge.

    `accuracy`: share of held-out real videos whose digit it tells.
    """

    def __init__(self, world: ToyWorld, cache_dir: str | Path) -> None:
        if world.config.frames < 2:
            raise ValueError(f"toy judge: motion needs at least 2 frames, the world has {world.config.frames}")
        self.world = world
        self.path = stored_at(cache_dir, "toy_judge", world.config)
        self._net, self.accuracy = kept(self.path, world.config.canvas, lambda: _train(world))
        self._references: dict[tuple[str, ...], _Reference] = {}

    def evaluate(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Every measure of these videos, by name. n >= 400 makes the Frechet distance worth reading.

        prompt_right, digit_right, direction_right: shares, each with its binomial standard error `*_se`. A direction is
            right if the mean displacement points more along the caption's than any other and is at least a third of the
            true speed.
        appearance_fd: Frechet distance of the videos' mean CNN features to those of real training videos of the same
            captions, in percent of the real features' total variance; appearance_fd_floor: the same for as many real
            held-out videos, what a perfect generator would score (mean of several draws, and their deviation *_sd).
            Far below the floor hints at copies of the training digits.
        motion_error: mean |speed - true speed| of the ink's centroid, in px/frame, with its standard error *_se.
        jitter: standard deviation, in px, of the centroid's frame-to-frame displacement about its mean over the video,
            with its standard error *_se.
        flicker: mean frame-to-frame |change of total ink|, as a share of real ink, beyond that of real videos.
        intensity: mean pixel, with *_se; intensity_real: that of real videos.
        clipped: share of values outside [0, 1].
        diversity: mean feature distance between videos of one caption, relative to real; nan if no caption is repeated.
        appearance_drift: mean distance of a video's features over its last 15 % of frames to those over its first, in
            percent of the spread of real videos; appearance_drift_real: real videos'.
        intensity_drift: mean magnitude of the mean pixel's change between the same frames, as a share of real
            intensity.
        motion: mean absolute change of a pixel from frame to frame; motion_real: real videos'.

        Raises ValueError if sizes disagree, fewer than 2 videos are given, or latents are not finite.
        """
        self._check(latents_BFCHW, captions)
        latents_BFCHW = latents_BFCHW.detach().cpu()
        pixels = self.world.decode(latents_BFCHW)[:, :, :1]
        told_digits, told_directions = zip(*(self.world.parse(caption) for caption in captions), strict=True)
        features_BFD, digits = self._appearance(pixels)
        features_BD = features_BFD.mean(dim=1)
        digit_ok = digits == torch.tensor(told_digits)
        direction_ok, speed_error, jitter = self._motion(pixels, told_directions)
        reference = self._reference(captions)
        real_ink = reference.ink.mean()
        count = len(captions)
        shares = {
            "prompt_right": (digit_ok & direction_ok).double().mean().item(),
            "digit_right": digit_ok.double().mean().item(),
            "direction_right": direction_ok.double().mean().item(),
        }
        return {
            **shares,
            **{f"{name}_se": binomial_error(share, count) for name, share in shares.items()},
            "appearance_fd": relative_distance(features_BD, reference.features),
            "appearance_fd_floor": reference.floor,
            "appearance_fd_floor_sd": reference.floor_sd,
            **_mean_and_error("motion_error", speed_error),
            **_mean_and_error("jitter", jitter),
            **_mean_and_error("intensity", pixels.mean(dim=(1, 2, 3, 4))),
            "intensity_real": real_ink.item() / self.world.config.canvas**2,
            "flicker": max(_flicker(_ink(pixels), real_ink) - _flicker(reference.ink, real_ink), 0.0),
            "clipped": clipped_share(self.world.decode(latents_BFCHW, clamp=False)).mean().item(),
            "diversity": relative_diversity(features_BD, captions, reference.features),
            "appearance_drift": _relative_drift(features_BFD, reference.features),
            "appearance_drift_real": reference.drift,
            "intensity_drift": drift(_ink(pixels)).abs().mean().item() / real_ink.item(),
            "motion": motion(pixels).mean().item(),
            "motion_real": reference.motion,
            "videos": float(count),
        }

    def features(self, pixels_BFCHW: Tensor) -> Tensor:
        """The CNN's features of each frame, [B, F, D], wherever in the frame the digit is; pixels in [0, 1].

        Raises ValueError for frames of another size than the world's.
        """
        side = self.world.config.canvas
        if pixels_BFCHW.ndim != 5 or tuple(pixels_BFCHW.shape[3:]) != (side, side):
            raise ValueError(f"toy judge: pixels must be [B, F, C, {side}, {side}], got {list(pixels_BFCHW.shape)}")
        return self._appearance(pixels_BFCHW[:, :, :1].detach().cpu())[0]

    @torch.no_grad()
    def adherence(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> Tensor:
        """[B] in [0, 1]: the caption's digit's probability, by the mean of the frames' log-likelihoods, and 0 for
        another direction: a reward, not a measure to report. NaN for a sample that holds NaN."""
        pixels = self.world.decode(latents_BFCHW.detach().float().cpu())[:, :, :1]
        digits, directions = zip(*(self.world.parse(caption) for caption in captions), strict=True)
        features_BFD = self._net(centred(pixels).flatten(0, 1)).unflatten(0, pixels.shape[:2])
        likelihood = self._net.head(features_BFD).log_softmax(-1).mean(dim=1).softmax(-1)
        right = likelihood[torch.arange(len(digits)), torch.tensor(digits)]
        return right * self._motion(pixels, directions)[0]

    def _check(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> None:
        frame = self.world.latent_shape[1:]
        if latents_BFCHW.ndim != 5 or latents_BFCHW.shape[2:] != frame or latents_BFCHW.shape[1] < 2:
            raise ValueError(
                f"toy judge: latents must be [B, F >= 2, {', '.join(map(str, frame))}], got {list(latents_BFCHW.shape)}"
            )
        check_samples("toy judge", latents_BFCHW, captions)

    def _motion(self, pixels: Tensor, directions: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(direction right, speed error in px/frame, jitter in px), each [B]."""
        step_BFxy = displacement(pixels)
        velocity_Bxy = step_BFxy.mean(dim=1)
        along_BV = velocity_Bxy @ torch.tensor(list(DIRECTIONS.values()), dtype=torch.float64).T
        wanted = torch.tensor([list(DIRECTIONS).index(direction) for direction in directions])
        moving = along_BV.amax(dim=1) >= self.world.config.speed / 3
        direction_ok = (along_BV.argmax(dim=1) == wanted) & moving
        speed_error = (velocity_Bxy.norm(dim=1) - self.world.config.speed).abs()
        jitter = (step_BFxy - velocity_Bxy[:, None]).square().sum(dim=2).mean(dim=1).sqrt()
        return direction_ok, speed_error, jitter

    def _appearance(self, pixels_BFCHW: Tensor) -> tuple[Tensor, Tensor]:
        """(CNN features of each frame [B, F, D], digit by the frames' joint likelihood [B])."""
        features, digits = [], []
        with torch.no_grad():
            for chunk in pixels_BFCHW.split(_CHUNK):
                features_BFD = self._net(centred(chunk).flatten(0, 1)).unflatten(0, chunk.shape[:2])
                features.append(features_BFD)
                digits.append(self._net.head(features_BFD).log_softmax(-1).mean(dim=1).argmax(-1))
        return torch.cat(features), torch.cat(digits)

    def _reference(self, captions: Sequence[str]) -> _Reference:
        key = tuple(captions)
        if key not in self._references:
            repeats = math.ceil(_REFERENCE_VIDEOS / len(captions))
            pixels, features_RFD = self._real(list(captions) * repeats, _SEED, "train")
            features = features_RFD.mean(dim=1)
            held_out = [self._real(captions, _SEED + draw, "test")[1].mean(dim=1) for draw in range(_FLOOR_DRAWS)]
            floors = torch.tensor([relative_distance(draw, features) for draw in held_out])
            self._references[key] = _Reference(
                features,
                _ink(pixels),
                floors.mean().item(),
                floors.std().item(),
                _relative_drift(features_RFD, features),
                motion(pixels).mean().item(),
            )
        return self._references[key]

    def _real(self, captions: Sequence[str], seed: int, split: Split) -> tuple[Tensor, Tensor]:
        """Real videos' (pixels, features of each frame)."""
        pixels = self.world.decode(self.world.real_videos_for(captions, seed, split))[:, :, :1]
        return pixels, self._appearance(pixels)[0]


def centroid_phase(pixels_BFCHW: Tensor) -> Tensor:
    """The ink's centroid on the torus as unit complex numbers [B, F, (x, y)]: angle 2 pi x / W.

    The circular mean ignores a uniform background and, unlike the plain centroid, has no edge to be drawn from.
    """
    ink_BFHW = pixels_BFCHW.double().sum(dim=2)
    phases = []
    for other, size in ((-2, ink_BFHW.shape[-1]), (-1, ink_BFHW.shape[-2])):
        angle = torch.arange(size, dtype=torch.float64) * (2 * math.pi / size)
        moment = (ink_BFHW.sum(dim=other) * torch.polar(torch.ones_like(angle), angle)).sum(dim=-1)
        phases.append(torch.polar(torch.ones_like(moment.real), moment.angle()))
    return torch.stack(phases, dim=-1)


def displacement(pixels_BFCHW: Tensor) -> Tensor:
    """Frame-to-frame motion of the ink's centroid, [B, F - 1, (x, y)] in pixels, the short way round the torus."""
    phase = centroid_phase(pixels_BFCHW)
    size_xy = torch.tensor([pixels_BFCHW.shape[-1], pixels_BFCHW.shape[-2]], dtype=torch.float64)
    return (phase[:, 1:] * phase[:, :-1].conj()).angle() * size_xy / (2 * math.pi)


def centred(pixels_BFCHW: Tensor) -> Tensor:
    """Every frame rolled by whole pixels so that its centroid is in the middle: place is no part of appearance. A
    frame with NaN has no centroid and stays as it is."""
    phase = centroid_phase(pixels_BFCHW)
    for dim, axis in ((-1, 0), (-2, 1)):
        size = pixels_BFCHW.shape[dim]
        shift = (phase[..., axis].angle() * (size / (2 * math.pi))).round().nan_to_num(size // 2).long()
        index = (torch.arange(size) + shift[..., None] - size // 2) % size
        index = index[:, :, None, None, :] if dim == -1 else index[:, :, None, :, None]
        pixels_BFCHW = pixels_BFCHW.gather(dim, index.expand(pixels_BFCHW.shape))
    return pixels_BFCHW


def _ink(pixels_BFCHW: Tensor) -> Tensor:
    """Total of each frame's pixels, [B, F]."""
    return pixels_BFCHW.sum(dim=(2, 3, 4))


def _mean_and_error(name: str, values_B: Tensor) -> dict[str, float]:
    return {name: values_B.mean().item(), f"{name}_se": values_B.std().item() / math.sqrt(len(values_B))}


def _flicker(ink_BF: Tensor, real_ink: Tensor) -> float:
    return (ink_BF.diff(dim=1).abs().mean() / real_ink).item()


def _relative_drift(features_BFD: Tensor, reference_RD: Tensor) -> float:
    """Mean distance between the features of the last and of the first frames, in percent of the reference's spread."""
    apart = drift(features_BFD).norm(dim=-1).mean()
    return 100 * (apart / reference_RD.var(dim=0).sum().sqrt()).item()


def _frames(world: ToyWorld, count: int, split: Split) -> tuple[Tensor, Tensor]:
    """The first `count` videos of a split, centred [count, F, 1, H, W], and their digits [count]."""
    batch = world.batch(range(count), split)
    digits = torch.tensor([world.parse(caption)[0] for caption in batch.captions])
    return centred(world.decode(batch.latents_BFCHW)[:, :, :1]), digits


def _train(world: ToyWorld) -> tuple[DigitNet, float]:
    """The network and its accuracy: the share of held-out videos whose digit the frames' joint likelihood tells."""
    frames_BFCHW, digits_B = _frames(world, _TRAINING_VIDEOS, "train")
    net = DigitNet.trained(frames_BFCHW.flatten(0, 1), digits_B.repeat_interleave(world.config.frames))
    frames_BFCHW, digits_B = _frames(world, _ACCURACY_VIDEOS, "test")
    with torch.no_grad():
        logits = net.head(net(frames_BFCHW.flatten(0, 1))).log_softmax(-1)
    told = logits.unflatten(0, frames_BFCHW.shape[:2]).mean(dim=1).argmax(-1)
    return net, (told == digits_B).double().mean().item()

"""The judge of the world of shapes: it measures videos by geometry alone. Nothing in it was trained.

The background is grey, so a pixel's chroma is its ink, and the hue of the ink says whose it is. The ink's centre,
tracked on the torus, gives direction, speed and jitter. The ink, moved to the middle, is compared with drawings of each
shape in each size. Appearance, motion and saturation are reported apart, as by the toy world's judge.
"""

# B batch  N objects  F frames  C channels  H W pixels  K colours  D features  T templates

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from utils.metrics import binomial_error, clipped_share, drift, motion
from worlds.digit_net import check_samples, relative_distance, relative_diversity
from worlds.glyphs import Split
from worlds.shapes import COLOURS, DIRECTIONS, SHAPES, SIZES, SPEEDS, ShapesWorld, Thing, coverage
from worlds.toy_judge import centroid_phase

# name -> (label, better), as of the toy world's judge
METRICS: Final = {
    "prompt_right": ("prompt right", "high"),
    "shape_right": ("shape right", "high"),
    "colour_right": ("colour right", "high"),
    "direction_right": ("direction right", "high"),
    "appearance_fd": ("appearance FD, %", "low"),
    "motion_error": ("speed error, px/frame", "low"),
    "jitter": ("jitter, px", "low"),
    "flicker": ("flicker", "low"),
    "saturation": ("saturation", "real"),
    "diversity": ("diversity", "real"),
    "appearance_drift": ("appearance drift", "real"),
    "motion": ("motion", "real"),
}
LIKENESS: Final = 0.94  # cosine with the best drawing, below which ink is of no shape; real videos of one have 0.955
_INK: Final = 0.06  # chroma below which a pixel counts as background
_PRESENT: Final = 0.4  # share of the ink of the smallest object of its size, below which there is no object
_FRAMES_SEEN: Final = {1: 0.5, 2: 0.8}  # quantile over frames, by objects: of two, one is hidden in part at times
_RADII: Final = tuple(2.6 + 0.4 * step for step in range(12))  # of the drawings, on a canvas of 32
_SEED: Final = 201117
_REFERENCE_VIDEOS: Final = 800  # at least: real videos behind the Frechet distance and the diversity
_FLOOR_DRAWS: Final = 3
_CHUNK: Final = 64  # videos at a time
# what a feature is divided by, so that each counts alike: its deviation in real videos, rounded, or more where real
# videos hardly differ: residuals of the four shapes, size, colour, background, its roughness, sharpness, stray ink
_SCALES: Final = (0.1, 0.1, 0.1, 0.1, 0.6, 0.25, 0.25, 0.25, 0.03, 0.01, 0.1, 0.05)
_PLACE_SCALE: Final = 3.0  # pixels, of the first frame's place in the diversity


@dataclass(frozen=True)
class Seen:
    """What was measured of each video's objects, in the order of its caption."""

    colour_ok: Tensor  # [B, N]
    likeness_NS: Tensor  # [B, N, shape]: cosine with the best drawing, the median over frames; see _FRAMES_SEEN
    radius: Tensor  # [B, N], on a canvas of 32
    velocity: Tensor  # [B, N, (x, y)] in pixels a frame on a canvas of 32, the median over frames
    jitter: Tensor  # [B, N]
    features: Tensor  # [B, N, F, D]
    place: Tensor  # [B, N, 4]: of the first frame, on the torus
    ink: Tensor  # [B, F]: of all colours

    @staticmethod
    def joined(parts: Sequence[Seen]) -> Seen:
        return Seen(*(torch.cat([getattr(part, name) for part in parts]) for name in Seen.__dataclass_fields__))


@dataclass(frozen=True)
class _Reference:
    """Real videos of the evaluated captions, each repeated equally often, and the distance's floor."""

    features: Tensor  # [R, D]
    varied: Tensor  # [R, D + 4]
    ink: Tensor
    floor: float
    floor_sd: float
    drift: float
    motion: float


class ShapesJudge:
    """Judges latents against captions, as `ToyJudge` does."""

    def __init__(self, world: ShapesWorld) -> None:
        if world.config.frames < 2:
            raise ValueError(f"shapes judge: motion needs at least 2 frames, the world has {world.config.frames}")
        self.world = world
        self._templates_TP = _templates(world.config.canvas)
        self._references: dict[tuple[str, ...], _Reference] = {}

    def evaluate(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """Every measure of these videos, by name. n >= 400 makes the Frechet distance worth reading.

        prompt_right: share of the videos that are right in all that their caption says, with its standard error *_se.
            shape_right, colour_right, direction_right, and size_right and speed_right where captions name them: shares
            of the objects, each with its standard error over videos. A colour is right if it is among those of the most
            ink, and there is enough of it. A shape is right if the ink is liker drawings of it than of others, and as
            like as LIKENESS. A direction is right if the object moves along it more than along any other, by at least a
            third of the true speed. What has the wrong colour is judged by the ink that is there instead.
        appearance_fd: Frechet distance of the objects' features (residuals from each shape, size, colour, background,
            sharpness, stray ink; means over frames) to those of real videos of the same captions, in percent of the
            real features' total variance. appearance_fd_floor: that of as many real videos (mean of draws, *_sd).
        motion_error: mean |speed - true speed|; jitter: deviation of the frame-to-frame displacement about its mean;
            both in pixels of a canvas of 32, with *_se.
        flicker: mean frame-to-frame |change of total ink|, as a share of real ink, beyond that of real videos.
        saturation: mean chroma of a pixel, with *_se; saturation_real: that of real videos.
        clipped: share of values outside [0, 1].
        diversity: mean distance of features, and of where the objects begin, between videos of one caption, relative to
            real; nan if no caption is repeated.
        appearance_drift: mean distance of a video's features over its last 15 % of frames to those over its first, in
            percent of the spread of real videos; appearance_drift_real: real videos'.
        motion: mean absolute change of a pixel from frame to frame; motion_real: real videos'.

        Raises ValueError if sizes disagree, fewer than 2 videos are given, or latents are not finite.
        """
        self._check(latents_BFCHW, captions)
        latents_BFCHW = latents_BFCHW.detach().float().cpu()
        contents = [self.world.parse(caption) for caption in captions]
        pixels = self.world.decode(latents_BFCHW)
        seen = self.look(pixels, contents)
        reference = self._reference(captions)
        real_ink = reference.ink.mean()
        right = self._right(seen, contents)
        all_right = torch.stack(list(right.values())).all(dim=0).all(dim=1).double().mean().item()
        speed_BN = torch.tensor([[SPEEDS[thing.speed] for thing in content] for content in contents])
        return {
            "prompt_right": all_right,
            "prompt_right_se": binomial_error(all_right, len(captions)),
            **{
                key: value
                for name, ok_BN in right.items()
                for key, value in _mean_and_error(name, ok_BN.double().mean(dim=1)).items()
            },
            "appearance_fd": relative_distance(_pooled(seen.features), reference.features),
            "appearance_fd_floor": reference.floor,
            "appearance_fd_floor_sd": reference.floor_sd,
            **_mean_and_error("motion_error", (seen.velocity.norm(dim=-1) - speed_BN).abs().mean(dim=1)),
            **_mean_and_error("jitter", seen.jitter.mean(dim=1)),
            "flicker": max(_flicker(seen.ink, real_ink) - _flicker(reference.ink, real_ink), 0.0),
            **_mean_and_error("saturation", seen.ink.mean(dim=1)),
            "saturation_real": real_ink.item(),
            "clipped": clipped_share(self.world.decode(latents_BFCHW, clamp=False)).mean().item(),
            "diversity": relative_diversity(_varied(seen), captions, reference.varied),
            "appearance_drift": _relative_drift(seen.features, reference.features),
            "appearance_drift_real": reference.drift,
            "motion": motion(pixels).mean().item(),
            "motion_real": reference.motion,
            "videos": float(len(captions)),
        }

    def right(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        """Which objects are right in what, by the names of `evaluate`: [B, N] each."""
        contents = [self.world.parse(caption) for caption in captions]
        return self._right(self.look(self.world.decode(latents_BFCHW.float().cpu()), contents), contents)

    def look(self, pixels_BFCHW: Tensor, contents: Sequence[Sequence[Thing]]) -> Seen:
        """Measures pixels in [0, 1] against what they should show."""
        parts = [
            self._look(chunk, contents[start : start + _CHUNK])
            for start, chunk in zip(range(0, len(contents), _CHUNK), pixels_BFCHW.split(_CHUNK), strict=True)
        ]
        return Seen.joined(parts)

    def _check(self, latents_BFCHW: Tensor, captions: Sequence[str]) -> None:
        frame = self.world.latent_shape[1:]
        if latents_BFCHW.ndim != 5 or latents_BFCHW.shape[2:] != frame or latents_BFCHW.shape[1] < 2:
            raise ValueError(
                f"shapes judge: latents must be [B, F >= 2, {', '.join(map(str, frame))}], "
                f"got {list(latents_BFCHW.shape)}"
            )
        check_samples("shapes judge", latents_BFCHW, captions)

    def _look(self, pixels: Tensor, contents: Sequence[Sequence[Thing]]) -> Seen:
        scale = self.world.config.scale
        ink_BKFHW = ink_by_colour(pixels)
        told_BN = torch.tensor([[list(COLOURS).index(thing.colour) for thing in content] for content in contents])
        chosen_BN, found_BN = _assigned(ink_BKFHW.sum(dim=(2, 3, 4)), told_BN)
        rows = torch.arange(len(pixels))[:, None]
        ink_BNFHW = ink_BKFHW[rows, chosen_BN]
        smallest = torch.tensor([[SIZES[thing.size][0] for thing in content] for content in contents])
        enough = 0.5 * math.pi * (smallest * scale).square() * _PRESENT  # of a chroma of a half
        phase = centroid_phase(ink_BNFHW.flatten(0, 1)[:, :, None]).unflatten(0, ink_BNFHW.shape[:2])
        step = (phase[:, :, 1:] * phase[:, :, :-1].conj()).angle() * (pixels.shape[-1] / (2 * math.pi * scale))
        likeness_BNFT = _likeness(in_the_middle(ink_BNFHW, phase), self._templates_TP)
        per_video = likeness_BNFT.quantile(_FRAMES_SEEN[told_BN.shape[1]], dim=2)
        per_video = per_video.unflatten(-1, (len(SHAPES), len(_RADII)))
        by_shape, size = per_video.max(dim=-1)
        best = by_shape.argmax(dim=-1)
        velocity = step.median(dim=2).values
        turn = pixels.shape[-1] / (2 * math.pi * scale)
        return Seen(
            colour_ok=found_BN & (ink_BNFHW.sum(dim=(-1, -2)).mean(dim=2) >= enough),
            likeness_NS=by_shape,
            radius=torch.tensor(_RADII)[size.gather(-1, best[..., None])[..., 0]],
            velocity=velocity.float(),
            jitter=(step - step.mean(dim=2, keepdim=True)).square().sum(dim=-1).mean(dim=2).sqrt().float(),
            features=self._features(pixels, ink_BNFHW, ink_BKFHW, likeness_BNFT),
            place=torch.view_as_real(phase[:, :, 0]).flatten(-2).float() * turn,
            ink=ink_BKFHW.sum(dim=1).mean(dim=(-1, -2)),
        )

    def _features(self, pixels: Tensor, ink_BNFHW: Tensor, ink_BKFHW: Tensor, likeness_BNFT: Tensor) -> Tensor:
        """[B, N, F, D], each about as varied in real videos as the others."""
        scale = self.world.config.scale
        residual = (1 - likeness_BNFT.unflatten(-1, (len(SHAPES), -1)).amax(dim=-1).square()).clamp(min=0).sqrt()
        total = ink_BNFHW.sum(dim=(-1, -2)).clamp(min=1e-6)
        area = total.square() / ink_BNFHW.square().sum(dim=(-1, -2)).clamp(min=1e-6)
        size = area.sqrt() / scale
        colour = torch.einsum("bnfhw,bfchw->bnfc", ink_BNFHW, pixels) / total[..., None]
        all_ink = ink_BKFHW.sum(dim=1)
        calm = (all_ink <= 0).float()
        grey = pixels.mean(dim=2)
        count = calm.sum(dim=(-1, -2)).clamp(min=1)
        tone = (grey * calm).sum(dim=(-1, -2)) / count
        # of neighbours, so that the gradient from top to bottom is not roughness
        rough = (grey.diff(dim=-1).abs() * calm[..., 1:] * calm[..., :-1]).sum(dim=(-1, -2)) / count
        slope = ink_BNFHW.diff(dim=-1).abs().sum(dim=(-1, -2)) + ink_BNFHW.diff(dim=-2).abs().sum(dim=(-1, -2))
        sharp = slope / (total / area * area.sqrt()) / 8
        stray = 1 - ink_BNFHW.sum(dim=1).sum(dim=(-1, -2)) / all_ink.sum(dim=(-1, -2)).clamp(min=1e-6)
        of_frame = torch.stack([tone, rough], dim=-1)[:, None].expand(-1, ink_BNFHW.shape[1], -1, -1)
        parts = [
            residual,
            size[..., None],
            colour,
            of_frame,
            sharp[..., None],
            stray[:, None, :, None].expand_as(sharp[..., None]),
        ]
        return torch.cat(parts, dim=-1) / torch.tensor(_SCALES)

    def _right(self, seen: Seen, contents: Sequence[Sequence[Thing]]) -> dict[str, Tensor]:
        """What is right of each object, [B, N]."""
        shape = _told(contents, "shape", list(SHAPES))
        right = {
            "shape_right": (seen.likeness_NS.argmax(dim=-1) == shape) & (seen.likeness_NS.amax(dim=-1) >= LIKENESS),
            "colour_right": seen.colour_ok,
        }
        along = seen.velocity @ torch.tensor(list(DIRECTIONS.values()), dtype=torch.float32).T
        speed = torch.tensor([[SPEEDS[thing.speed] for thing in content] for content in contents])
        moving = along.amax(dim=-1) >= speed / 3
        right["direction_right"] = (along.argmax(dim=-1) == _told(contents, "direction", list(DIRECTIONS))) & moving
        if self.world.config.sizes:
            right["size_right"] = _nearest(
                seen.radius, {name: sum(SIZES[name]) / 2 for name in SIZES if name}, contents, "size"
            )
        if self.world.config.speeds:
            named = {name: SPEEDS[name] for name in SPEEDS if name}
            right["speed_right"] = _nearest(seen.velocity.norm(dim=-1), named, contents, "speed")
        return right

    def _reference(self, captions: Sequence[str]) -> _Reference:
        key = tuple(captions)
        if key not in self._references:
            repeats = math.ceil(_REFERENCE_VIDEOS / len(captions))
            pixels, seen = self._real(list(captions) * repeats, _SEED, "train")
            features = _pooled(seen.features)
            draws = [_pooled(self._real(captions, _SEED + draw, "test")[1].features) for draw in range(_FLOOR_DRAWS)]
            floors = torch.tensor([relative_distance(draw, features) for draw in draws])
            self._references[key] = _Reference(
                features,
                _varied(seen),
                seen.ink,
                floors.mean().item(),
                floors.std().item(),
                _relative_drift(seen.features, features),
                motion(pixels).mean().item(),
            )
        return self._references[key]

    def _real(self, captions: Sequence[str], seed: int, split: Split) -> tuple[Tensor, Seen]:
        pixels = self.world.decode(self.world.real_videos_for(captions, seed, split))
        return pixels, self.look(pixels, [self.world.parse(caption) for caption in captions])


def ink_by_colour(pixels_BFCHW: Tensor) -> Tensor:
    """Chroma of each pixel, max - min of its colours, on the map of the named colour that its hue is nearest to:
    [B, K, F, H, W]. What grey there is does not count."""
    chroma = pixels_BFCHW.amax(dim=2) - pixels_BFCHW.amin(dim=2)
    hue = _hue(pixels_BFCHW, chroma)
    apart = torch.stack([((hue - middle + 180) % 360 - 180).abs() for middle, _ in COLOURS.values()], dim=1)
    whose = apart.argmin(dim=1)
    ink = (chroma - _INK).clamp(min=0)
    return torch.stack([torch.where(whose == k, ink, 0) for k in range(len(COLOURS))], dim=1)


def _hue(pixels_BFCHW: Tensor, chroma: Tensor) -> Tensor:
    """The hue of HSV in degrees."""
    red, green, blue = pixels_BFCHW.unbind(2)
    chroma = chroma.clamp(min=1e-6)
    high = pixels_BFCHW.argmax(dim=2)
    sectors = ((green - blue) / chroma, (blue - red) / chroma + 2, (red - green) / chroma + 4)
    return 60 * torch.where(high == 0, sectors[0], torch.where(high == 1, sectors[1], sectors[2]))


def in_the_middle(ink_xFHW: Tensor, phase_xFxy: Tensor) -> Tensor:
    """Each frame moved on the torus, by fractions of a pixel: its centre (`centroid_phase`) comes to the middle."""
    height, width = ink_xFHW.shape[-2:]
    waves_y, waves_x = torch.fft.fftfreq(height) * height, torch.fft.rfftfreq(width) * width
    # the middle is half a turn on
    turn_x = phase_xFxy[..., 0].angle()[..., None] + math.pi
    turn_y = phase_xFxy[..., 1].angle()[..., None] + math.pi
    shift = torch.exp(1j * (waves_y * turn_y)[..., :, None]) * torch.exp(1j * (waves_x * turn_x)[..., None, :])
    return torch.fft.irfft2(torch.fft.rfft2(ink_xFHW.double()) * shift, s=(height, width)).float()


def _templates(canvas: int) -> Tensor:
    """Drawings of each shape in each size, in the middle, as unit vectors [T, H * W]."""
    scale = canvas / 32
    grid = torch.arange(canvas) + 0.5 - canvas / 2
    x, y = grid[None, None, None, :], grid[None, None, :, None]
    drawings = [
        coverage(shape, x, y, torch.tensor(radius * scale), scale).expand(1, 1, canvas, canvas)
        for shape in SHAPES
        for radius in _RADII
    ]
    ink = (torch.cat(drawings) * 0.65 - _INK).clamp(min=0)
    return _unit(in_the_middle(ink, centroid_phase(ink[:, :, None])).flatten(1))


def _likeness(ink_BNFHW: Tensor, templates_TP: Tensor) -> Tensor:
    """Cosines with the drawings, [B, N, F, T]."""
    return _unit(ink_BNFHW.flatten(-2)) @ templates_TP.T


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def _assigned(mass_BK: Tensor, told_BN: Tensor) -> tuple[Tensor, Tensor]:
    """(the colour whose ink stands for each object, whether it is the one it should have), both [B, N].

    There are as many objects as told. Colours of the most ink are there; who misses its own gets one that nobody has.
    """
    present = mass_BK.topk(told_BN.shape[1], dim=1).indices
    found = (told_BN[:, :, None] == present[:, None, :]).any(dim=2)
    chosen = told_BN.clone()
    for row in (~found.all(dim=1)).nonzero()[:, 0].tolist():
        free = [k for k in present[row].tolist() if k not in told_BN[row].tolist()]
        for number in (~found[row]).nonzero()[:, 0].tolist():
            chosen[row, number] = free.pop(0)
    return chosen, found


def _told(contents: Sequence[Sequence[Thing]], attribute: str, names: Sequence[str]) -> Tensor:
    return torch.tensor([[names.index(getattr(thing, attribute)) for thing in content] for content in contents])


def _nearest(
    measured_BN: Tensor, values: dict[str, float], contents: Sequence[Sequence[Thing]], attribute: str
) -> Tensor:
    """Whether what was measured is nearest to the named value."""
    apart = (measured_BN[..., None] - torch.tensor(list(values.values()))).abs()
    return apart.argmin(dim=-1) == _told(contents, attribute, list(values))


def _pooled(features_BNFD: Tensor) -> Tensor:
    """Means over frames, of all objects alike: [B * N, D]."""
    return features_BNFD.mean(dim=2).flatten(0, 1)


def _varied(seen: Seen) -> Tensor:
    """What may differ between videos of one caption, [B, N * (D + 4)]."""
    return torch.cat([seen.features.mean(dim=2), seen.place / _PLACE_SCALE], dim=-1).flatten(1)


def _relative_drift(features_BNFD: Tensor, reference_RD: Tensor) -> float:
    apart = drift(features_BNFD.flatten(0, 1)).norm(dim=-1).mean()
    return 100 * (apart / reference_RD.var(dim=0).sum().sqrt()).item()


def _flicker(ink_BF: Tensor, real_ink: Tensor) -> float:
    return (ink_BF.diff(dim=1).abs().mean() / real_ink).item()


def _mean_and_error(name: str, values_B: Tensor) -> dict[str, float]:
    return {name: values_B.mean().item(), f"{name}_se": values_B.std().item() / math.sqrt(len(values_B))}

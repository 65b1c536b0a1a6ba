"""A text-to-video world in colour with known ground truth: shapes that glide over a calm torus.

The caption names colour, shape and direction: "a red circle moving left". The exact colour, the size, the start, the
offset across the motion and the tone of the background are left to chance, so there is something to be diverse about.

There are two settings. The easy one has one object, which touches no edge within the default video. The harder one has
two that pass each other on the whole torus, and may name sizes and speeds: "a small red circle moving slowly left and a
large blue star moving quickly up". The object named first is in front.

A fixed code stands in for the VAE: pixels [B, F, 3, 32, 32] <-> latents [B, F, 46, 4, 4] (see `block_dct`).
"""

# B batch  N objects  F frames  C channels  H W size (pixels or latents)  K uniform draws

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.limits import FRAMES, SIDE, VOLUME, check_counts
from worlds.block_dct import BLOCK, BlockDCT
from worlds.glyphs import Split, check_draws, uniform
from worlds.toy import ToyBatch

SHAPES: Final = ("circle", "square", "triangle", "star")
COLOURS: Final = {"red": (2, 12), "yellow": (48, 7), "green": (135, 15), "blue": (222, 13)}  # hue +- range, degrees
DIRECTIONS: Final = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y) of one step, y downwards
# lengths in pixels of a canvas of 32
UNIT: Final = 32
SIZES: Final = {"": (4.6, 5.8), "small": (3.4, 4.2), "large": (5.4, 6.2)}  # radius, from a to b
SPEEDS: Final = {"": 2.0, "slowly": 1.2, "quickly": 2.6}  # of a frame
EDGE: Final = 2.6  # over which an object fades into the background
REACH: Final = 1.35  # radii from the centre within which all of an object lies
_TONE: Final = (0.86, 0.94)  # of the background's middle
_GRADIENT: Final = 0.05  # from the middle to the top (brighter) and to the bottom (darker)
_SATURATION: Final = (0.72, 0.88)
_VALUE: Final = (0.82, 0.95)
_STREAMS: Final = {"train": 0, "test": 1, "real": 2}
_CHANCE: Final = 6  # draws of an object that its caption does not fix: hue, saturation, value, radius, start, across


@dataclass
class ShapesWorldConfig:
    """Geometry and randomness of the world. Lengths in pixels of a canvas of 32; another canvas shows the same, scaled.

    frames: of a video.
    seed: of the draws of what is seen, and where.
    canvas: side of the square torus.
    objects: 1 or 2. Two differ in shape and in colour.
    sizes: whether captions name sizes.
    speeds: whether captions name speeds.
    start: an object begins U(0, start) from the edge it moves away from; 32 is the whole torus.
    across: its offset from the middle, perpendicular to the motion, is U(-across, across); 16 is the whole torus.
    """

    frames: int = 6
    seed: int = 0
    canvas: int = UNIT
    objects: int = 1
    sizes: bool = False
    speeds: bool = False
    start: float = 3.0
    across: float = 6.0

    def __post_init__(self) -> None:
        check_counts(self, {"frames": FRAMES, "canvas": BLOCK * SIDE})
        if self.frames * (self.canvas // BLOCK) ** 2 > VOLUME:
            raise ValueError(
                f"shapes: {self.frames} frames of canvas {self.canvas} have more than {VOLUME} tokens: lower one"
            )
        if self.canvas % BLOCK:
            raise ValueError(f"shapes: canvas must be a multiple of {BLOCK}, got {self.canvas}")
        if self.objects not in (1, 2):
            raise ValueError(f"shapes: objects must be 1 or 2, got {self.objects}")
        if not 0 <= self.start <= UNIT:
            raise ValueError(f"shapes: start must be in [0, {UNIT}] pixels, got {self.start}")
        if not 0 <= self.across <= UNIT / 2:
            raise ValueError(f"shapes: across must be in [0, {UNIT // 2}] pixels, got {self.across}")

    @property
    def scale(self) -> float:
        """Pixels of this canvas in one of a canvas of 32."""
        return self.canvas / UNIT


@dataclass(frozen=True)
class Thing:
    """What a caption says of one object; size and speed are "" where captions don't name them."""

    shape: str
    colour: str
    direction: str
    size: str = ""
    speed: str = ""

    def __str__(self) -> str:
        words = ("a", self.size, self.colour, self.shape, "moving", self.speed, self.direction)
        return " ".join(word for word in words if word)


class ShapesWorld:
    """Makes samples on the fly; each is a pure function of (config, split, index) and does not depend on its batch."""

    def __init__(self, config: ShapesWorldConfig) -> None:
        self.config = config
        self.side = config.canvas  # pixels
        side = config.canvas // BLOCK
        self._code = BlockDCT()
        self.latent_shape: tuple[int, ...] = (config.frames, self._code.channels, side, side)
        things = [
            Thing(shape, colour, direction, size, speed)
            for shape in SHAPES
            for colour in COLOURS
            for direction in DIRECTIONS
            for size in (("small", "large") if config.sizes else ("",))
            for speed in (("slowly", "quickly") if config.speeds else ("",))
        ]
        self._known = {str(thing): thing for thing in things}
        self._contents = [(thing,) for thing in things] if config.objects == 1 else _pairs(things)
        sentences = {thing: str(thing) for thing in things}
        self.captions = [" and ".join([sentences[thing] for thing in content]) for content in self._contents]

    def caption(self, things: Sequence[Thing]) -> str:
        """The only sentence for this content: "a red circle moving left and a blue star moving up"."""
        return " and ".join(map(str, things))

    def parse(self, caption: str) -> tuple[Thing, ...]:
        """The objects of a caption; the inverse of `caption`. Raises ValueError on any other sentence."""
        things = [self._known.get(part) for part in " ".join(caption.lower().split()).split(" and ")]
        known = tuple(thing for thing in things if thing is not None)
        if len(known) == len(things) == self.config.objects and (len(known) == 1 or _differ(*known)):
            return known
        raise ValueError(
            f"shapes: cannot read caption {caption!r}; write one like {self.captions[0]!r}, with colours "
            f"{', '.join(COLOURS)}, shapes {', '.join(SHAPES)} and directions {', '.join(DIRECTIONS)}"
            + ("; two objects differ in both colour and shape" if self.config.objects == 2 else "")
        )

    def resized(self, frames: int, height: int) -> ShapesWorld:
        """The same world with so many frames, and with latents of this height; itself if it has both already."""
        config = replace(self.config, frames=frames, canvas=BLOCK * height)
        return self if config == self.config else ShapesWorld(config)

    def batch(self, indices: Sequence[int], split: Split) -> ToyBatch:
        """The samples with these indices. Raises ValueError on an unknown split or a negative index."""
        check_draws("shapes", indices, split)
        draws = 2 + _CHANCE * self.config.objects
        u_BK = uniform([self.config.seed, _STREAMS[split]], np.asarray(indices, dtype=np.uint64), draws)
        chosen = [self._contents[int(u * len(self._contents))] for u in u_BK[:, 0]]
        return ToyBatch(self._render(chosen, u_BK[:, 1:]), [self.caption(content) for content in chosen])

    def real_videos_for(self, captions: Sequence[str], seed: int, split: Split = "test") -> Tensor:
        """Real latents [B, F, C, H, W] that fit these captions: what a perfect generator could have made.

        `seed` and `split` pick the draws, which differ from `batch`'s.
        """
        check_draws("shapes", (), split)
        key = [self.config.seed, _STREAMS["real"], _STREAMS[split], seed]
        draws = 1 + _CHANCE * self.config.objects
        u_BK = uniform(key, np.arange(len(captions), dtype=np.uint64), draws)
        return self._render([self.parse(caption) for caption in captions], u_BK)

    def encode(self, pixels_BFCHW: Tensor) -> Tensor:
        """Pixels in [0, 1], grey or RGB, to latents. Raises ValueError on another shape."""
        channels, height, width = pixels_BFCHW.shape[2:]
        side = self.config.canvas
        if channels not in (1, 3) or (height, width) != (side, side):
            raise ValueError(f"shapes: pixels must be [B, F, 1 or 3, {side}, {side}], got {list(pixels_BFCHW.shape)}")
        return self._code.encode(pixels_BFCHW.expand(-1, -1, 3, -1, -1))

    def decode(self, latents_BFCHW: Tensor, *, clamp: bool = True) -> Tensor:
        """Latents to pixels [B, F, 3, H, W], in [0, 1] unless `clamp` is off."""
        pixels = self._code.decode(latents_BFCHW)
        return pixels.clamp(0, 1) if clamp else pixels

    def _render(self, contents: Sequence[Sequence[Thing]], u_BK: NDArray[np.float64]) -> Tensor:
        return self.encode(self.draw(contents, u_BK))

    def draw(self, contents: Sequence[Sequence[Thing]], u_BK: NDArray[np.float64]) -> Tensor:
        """Pixels [B, F, 3, H, W] before they are encoded; u_BK [B, 1 + 6 N] in [0, 1): the background's tone, and what
        is left to chance of each object."""
        config = self.config
        grid = torch.arange(config.canvas, dtype=torch.float64) + 0.5
        tone_B = torch.from_numpy(_within(u_BK[:, 0], _TONE))
        slope_H = _GRADIENT * (1 - 2 * grid / config.canvas)
        pixels = (tone_B[:, None] + slope_H).float()[:, None, None, :, None]
        pixels = pixels.expand(-1, config.frames, 3, -1, config.canvas)
        for number in reversed(range(config.objects)):  # the first one last: it is in front
            things = [content[number] for content in contents]
            u_BC = u_BK[:, 1 + _CHANCE * number : 1 + _CHANCE * (number + 1)]
            radius_B = np.array([_within(u, SIZES[thing.size]) for u, thing in zip(u_BC[:, 3], things, strict=True)])
            place_BFxy = torch.from_numpy(_places(config, things, radius_B, u_BC[:, 4:]) * config.scale)
            away = grid - place_BFxy[..., None]  # [B, F, (x, y), pixel]
            away = away - config.canvas * (away / config.canvas).round()  # the short way round the torus
            x, y = away[:, :, 0, None, :].float(), away[:, :, 1, :, None].float()
            radius = torch.from_numpy(radius_B * config.scale).float()[:, None, None, None]
            cover = torch.empty(len(things), config.frames, config.canvas, config.canvas)
            for shape in SHAPES:
                rows = [i for i, thing in enumerate(things) if thing.shape == shape]
                cover[rows] = coverage(shape, x[rows], y[rows], radius[rows], config.scale)
            cover = cover[:, :, None]
            colour = torch.from_numpy(_colours(things, u_BC)).float()[:, None, :, None, None]
            pixels = pixels * (1 - cover) + colour * cover
        return pixels


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor, scale: float) -> Tensor:
    """How much of a pixel at (x, y) from an object's centre the object covers, in [0, 1], with a soft edge."""
    outside = _outside(shape, x, y, radius)
    t = (0.5 - outside / (EDGE * scale)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _outside(shape: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Distance from the outline, negative within; near corners it is that to the nearest side's line.

    Only arithmetic, minima and square roots, which round alike everywhere.
    """
    match shape:
        case "circle":
            return (x * x + y * y).sqrt() - radius
        case "square":
            return torch.maximum(x.abs(), y.abs()) - 0.87 * radius
        case "triangle":  # upright; its centre is the centroid
            slanted = math.sqrt(0.75) * x.abs() - 0.5 * y
            return torch.maximum(slanted, y.expand_as(slanted)) - 0.66 * radius
    # a pentagram is where at most one of five half-planes is left; its points are cut off at the radius
    angles = [math.pi * (2 * k / 5 + 0.5) for k in range(5)]
    first, second = None, None
    for angle in angles:
        side = x * math.cos(angle) + y * math.sin(angle)
        if first is None or second is None:
            first, second = (side, torch.full_like(side, -math.inf)) if first is None else (first, side)
            continue
        second = torch.maximum(second, torch.minimum(first, side))
        first = torch.maximum(first, side)
    assert second is not None
    return torch.maximum(second - 0.5 * radius, (x * x + y * y).sqrt() - 1.3 * radius)


def _within(u: NDArray[np.float64] | float, ends: tuple[float, float]) -> NDArray[np.float64]:
    return np.asarray(ends[0] + (ends[1] - ends[0]) * u)


def _places(
    config: ShapesWorldConfig, things: Sequence[Thing], radius_B: NDArray[np.float64], u_B2: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Centres [B, F, (x, y)] on a canvas of 32, not yet wrapped onto the torus."""
    step_Bxy = np.array([DIRECTIONS[thing.direction] for thing in things], dtype=np.float64).reshape(-1, 2)
    speed_B = np.array([SPEEDS[thing.speed] for thing in things], dtype=np.float64)
    along_B = REACH * radius_B + u_B2[:, 0] * config.start - UNIT / 2  # from the middle, in the direction of motion
    across_B = (2 * u_B2[:, 1] - 1) * config.across
    along_BF = along_B[:, None] + speed_B[:, None] * np.arange(config.frames)
    sideways = np.abs(step_Bxy[:, ::-1])
    return np.asarray(UNIT / 2 + along_BF[..., None] * step_Bxy[:, None] + (across_B[:, None] * sideways)[:, None])


def _colours(things: Sequence[Thing], u_BK: NDArray[np.float64]) -> NDArray[np.float64]:
    """RGB [B, 3] from draws of hue, saturation and value."""
    middle, spread = np.array([COLOURS[thing.colour] for thing in things], dtype=np.float64).reshape(-1, 2).T
    hue = middle + spread * (2 * u_BK[:, 0] - 1)
    saturation, value = _within(u_BK[:, 1], _SATURATION), _within(u_BK[:, 2], _VALUE)
    k = (np.array([5.0, 3.0, 1.0]) + hue[:, None] / 60) % 6
    return np.asarray(value[:, None] * (1 - saturation[:, None] * np.clip(np.minimum(k, 4 - k), 0, 1)))


def _pairs(things: Sequence[Thing]) -> list[tuple[Thing, ...]]:
    return [(a, b) for a in things for b in things if _differ(a, b)]


def _differ(a: Thing, b: Thing) -> bool:
    return a.shape != b.shape and a.colour != b.colour

"""Sizes that clips are cut to: frames, height and width of a bucket, and which one suits a video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Frames, height and width in pixels, of a bucket."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(f"bucket: frames, height and width must be at least 1, got {self}")

    @classmethod
    def parse(cls, text: str) -> Size:
        """From "81x480x832" (frames x height x width). Raises ValueError."""
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
            raise ValueError(f"bucket {text!r}: write FRAMESxHEIGHTxWIDTH, such as 81x480x832")
        return cls(*map(int, parts))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Info:
    """What a video is, from its header: frames, frames a second, height and width as it is shown."""

    frames: int
    fps: float
    height: int
    width: int


@dataclass(frozen=True)
class Pace:
    """How a clip's frames are taken: at `fps` frames a second, or every `interval`-th where fps is None."""

    fps: float | None = None
    interval: int = 1

    def __post_init__(self) -> None:
        if self.interval < 1 or (self.fps is not None and (self.fps <= 0 or self.interval != 1)):
            raise ValueError(
                f"pace: fps must be above 0 and the interval at least 1, and only one of them given; got {self}"
            )

    def step(self, source_fps: float) -> float:
        """Seconds between two frames of a clip."""
        return 1 / self.fps if self.fps is not None else self.interval / source_fps

    def span(self, frames: int, source_fps: float) -> float:
        """Frames of the video that `frames` of a clip reach over."""
        return (frames - 1) * self.step(source_fps) * source_fps + 1


def check_sizes(sizes: Sequence[Size], temporal: int, spatial: int) -> None:
    """Raises ValueError unless a VAE and a DiT can take the sizes: 1 + n x temporal frames, sides of n x spatial.

    For Wan 2.1 they are 4 and 16 (8 of the VAE, 2 of the patches), for Wan 2.2 5B 4 and 32.
    """
    if not sizes:
        raise ValueError("buckets: give at least one, such as 81x480x832")
    for size in sizes:
        if (size.frames - 1) % temporal:
            below = size.frames - (size.frames - 1) % temporal
            raise ValueError(
                f"bucket {size}: frames must be 1 + a multiple of {temporal}, such as {below} or {below + temporal}"
            )
        if size.height % spatial or size.width % spatial:
            near = [max(round(side / spatial), 1) * spatial for side in (size.height, size.width)]
            raise ValueError(
                f"bucket {size}: height and width must be multiples of {spatial}, such as {near[0]}x{near[1]}"
            )


def choose(info: Info, sizes: Sequence[Size], pace: Pace) -> tuple[int | None, str]:
    """(number of the bucket, "") for a video, or (None, why none suits it).

    Of the buckets that the video is long enough for: the nearest aspect ratio (in its logarithm), then the most frames,
    then the most pixels. A video is never slowed down: one of fewer frames a second than `pace` asks for suits none.
    """
    if pace.fps is not None and info.fps < 0.95 * pace.fps:
        return None, f"has {info.fps:g} frames a second, fewer than the {pace.fps:g} asked for"
    # a header may say one frame too few, and rates such as 29.97 are not met exactly
    fitting = [i for i, size in enumerate(sizes) if pace.span(size.frames, info.fps) <= info.frames + 0.5]
    if not fitting:
        least = min(pace.span(size.frames, info.fps) for size in sizes)
        return None, f"has {info.frames} frames, and the shortest bucket needs {math.ceil(least - 0.5)}"

    def badness(number: int) -> tuple[float, int, int]:
        size = sizes[number]
        aspect = abs(math.log(size.width / size.height) - math.log(info.width / info.height))
        return round(aspect, 6), -size.frames, -size.height * size.width

    return min(fitting, key=badness), ""


def cover(height: int, width: int, size: Size) -> tuple[int, int]:
    """(height, width) to scale a picture to, so that it covers `size` with the least left over to crop."""
    scale = max(size.height / height, size.width / width)
    return max(round(height * scale), size.height), max(round(width * scale), size.width)

"""Images and videos that inference.py is given: `--image`, `--video` with `--strength` or `--extend`.

T pixel frames  C channels  h w pixel size
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from generation.generator import Generator
from generation.sampling import Sampling
from utils.data.clips import decode_end, decode_image
from utils.data.media import Media, Part
from utils.errors import UserError


@dataclass(frozen=True)
class FootageArgs:
    """image: the first frame. video: a clip to start from, by Sampling.strength, or to go on from where `extend` is
    given: so many of its last frames, in latent frames, start the new video; 0 lets the network choose."""

    image: Path | None = None
    video: Path | None = None
    extend: int | None = None


class Footage(NamedTuple):
    """Pixels in [0, 1] as `Generator.stream` takes them, or None. first_frames: [T, C, h, w]; clip: [T, C, h, w]."""

    first_frames: Tensor | None = None
    clip: Tensor | None = None


def footage_args(a: argparse.Namespace) -> FootageArgs:
    """Raises UserError for options that make no sense together."""
    used = next((name for name in ("strength", "extend") if getattr(a, name) is not None), None)
    if (a.video is None) != (used is None):
        if a.video is None:
            raise UserError(f"--{used} is for --video: give its file, too")
        raise UserError("--video: add --strength 0.6, say, to make it anew, or --extend to go on from its end")
    if a.strength is not None and not 0 < a.strength <= 1:
        raise UserError(f"--strength {a.strength}: give a share of the steps in (0, 1]; less keeps more of the clip")
    if a.extend is not None and a.extend < 0:
        raise UserError(f"--extend {a.extend}: give at least 1 latent frame, or no number for the network's own")
    return FootageArgs(a.image, a.video, a.extend)


def read_footage(generator: Generator, args: FootageArgs, sampling: Sampling) -> Footage:
    """What the command names, scaled to cover the network's size, the middle cropped. Raises UserError."""
    option = "--image" if args.image is not None else "--video"
    file = args.image or args.video
    if file is None:
        return Footage()
    if not file.is_file():
        raise UserError(f"{option}: no such file: {file}")
    media, task = Media(str(file), Part(file), None), generator.task
    try:
        if option == "--image":
            return Footage(first_frames=decode_image(media, task.pixel_size(1)))
        if args.extend is not None:
            frames = args.extend or generator.context_frames
            return Footage(first_frames=decode_end(media, task.pixel_size(frames), last=True))
        frames = sampling.frames or task.latent_shape[0]
        return Footage(clip=decode_end(media, task.pixel_size(frames), last=False))
    except ValueError as problem:
        raise UserError(f"{option}: {problem}") from None

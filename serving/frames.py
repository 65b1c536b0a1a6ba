"""Frames as images for the page, and the video that is kept of them for the download.

T frames  H W pixel size
"""

from __future__ import annotations

import io
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from utils.video import Frame, Frames, write_mp4

LOSSLESS_SIDE = 128  # up to here PNG: a few kB at most, and the page enlarges pixels, which would show JPEG's edges
QUALITY = 90  # beyond it JPEG, which takes a tenth of the time of PNG or WebP at 480p


def encode(frames: Frames) -> list[bytes]:
    """Each frame of [T, H, W, 3] as PNG if it is small, else as JPEG without chroma subsampling."""
    from PIL import Image

    small = max(frames.shape[1:3]) <= LOSSLESS_SIDE
    images = []
    for frame in frames:
        buffer, image = io.BytesIO(), Image.fromarray(frame)
        if small:
            image.save(buffer, "PNG", compress_level=1)
        else:
            image.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
        images.append(buffer.getvalue())
    return images


class Kept:
    """The frames of one video as they were sent, reached by a token that cannot be guessed."""

    def __init__(self, fps: int, scale: int) -> None:
        self.token = secrets.token_urlsafe(24)
        self.images: list[bytes] = []
        self.busy = False  # an MP4 is being made of it, or sent
        self._fps, self._scale = fps, scale

    def mp4(self, path: Path) -> None:
        """Writes H.264 of the frames so far, of which there has to be one."""
        write_mp4(path, self._frames(), self._fps)

    def _frames(self) -> Iterator[Frame]:
        from PIL import Image

        for data in list(self.images):  # the video may go on meanwhile
            with Image.open(io.BytesIO(data)) as image:
                yield np.asarray(image.convert("RGB")).repeat(self._scale, 0).repeat(self._scale, 1)

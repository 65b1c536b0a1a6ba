"""Videos for evaluation: a run's, decoded a batch at a time, and real ones of a folder.

B batch  T pixel frames  C channels  h w pixels
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from generation.generator import Generator
from generation.sampling import Sampling
from model.family import FirstFrame
from utils.data.media import IMAGES, VIDEOS
from utils.data.shard_files import found_files
from utils.errors import UserError
from utils.video import read_image, read_video


def generated_videos(
    generator: Generator, prompts: Sequence[str], sampling: Sampling, ids: Sequence[int], batch: int
) -> Iterator[Tensor]:
    """Pixels [B, T, 3, h, w] in [0, 1], in CPU memory; video i is keyed by ids[i]. Raises UserError."""
    if generator.first_frame is FirstFrame.channels:
        raise UserError("--run: this network makes videos from an image, and evaluation has prompts only")
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        latents = generator(prompts[part], sampling, ids[part])
        with torch.no_grad():
            try:
                yield generator.task.decode(latents).float().cpu()
            except UserError:
                raise
            except ValueError as problem:  # a run that trained on stored latents need not have a decoder
                raise UserError(f"--run: {problem}") from None


def real_videos(folder: Path, frames: int) -> Iterator[Tensor]:
    """Pixels [1, T, 3, h, w] in [0, 1] of each video under a folder, at most its first `frames` frames.

    A folder without videos gives its images, with T = 1. Raises UserError.
    """
    try:
        files = found_files(folder, *VIDEOS, *IMAGES)
        if videos := [file for file in files if file.suffix.lower() in VIDEOS]:
            files = videos
        for file in files:
            pixels = read_video(file) if videos else read_image(file)[None]
            yield pixels[None, :frames]
    except (ValueError, OSError) as problem:
        raise UserError(f"--real: {problem}: give a folder of videos or images") from None

"""Random data of any size, for benchmarks, smoke tests and plans where no VAE and no text encoder is at hand."""

from __future__ import annotations

from dataclasses import dataclass

from utils.limits import check_counts, check_video

PROMPTS = 1_000_000  # random embeddings differ in nothing that a plan or a benchmark measures


@dataclass
class SyntheticConfig:
    """Latents of unit normal noise, one random text embedding a prompt. Channels are the student's own.

    frames, height, width: of a latent video; the defaults are 81 frames of 480x832 pixels through Wan2.1's VAE.
    prompts: how many numbered ones there are where data.prompts names no file.
    """

    frames: int = 21
    height: int = 60
    width: int = 104
    prompts: int = 1024

    def __post_init__(self) -> None:
        check_video(self)
        check_counts(self, {"prompts": PROMPTS}, "they are a list in memory")

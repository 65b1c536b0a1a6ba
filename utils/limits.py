"""Sizes that no real run reaches: a number above them is a slip of the hand, and would end in a failed allocation."""

from __future__ import annotations

from typing import Any

# Latent frames of one sample: 4.6 hours at 24 frames a second and 4 frames a latent one. The longest training videos
# are minutes, and the keys and values of one latent frame of Wan 1.3B at 480p take 0.3 GB.
FRAMES = 100_000
# Latent height or width: 32,768 pixels at 8 a latent one, twice the width of 16K video.
SIDE = 4096
# Latent elements (frames x height x width) of one sample: attention kernels count tokens in 32-bit integers.
VOLUME = 2**31 - 1
# Samples of one update: at the 32,760 tokens of a Wan clip 3e10 tokens, hundreds of times a language model's largest.
BATCH = 1_000_000


def check_counts(section: Any, limits: dict[str, int], why: str = "no real video is larger") -> None:
    """Raises ValueError unless each named field of a section is from 1 to its limit, or None where it may be."""
    for name, limit in limits.items():
        value = getattr(section, name)
        if value is None:
            continue
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if value > limit:
            raise ValueError(f"{name} must be at most {limit} ({why}), got {value}: lower it")


def check_video(section: Any) -> None:
    """Raises ValueError for `frames`, `height` and `width` of a latent video that no run can have."""
    check_counts(section, {"frames": FRAMES, "height": SIDE, "width": SIDE})
    volume = section.frames * section.height * section.width
    if volume > VOLUME:
        raise ValueError(
            f"frames x height x width is {volume}, and attention counts at most {VOLUME} tokens: lower one of them"
        )

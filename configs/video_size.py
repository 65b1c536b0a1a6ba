"""The sizes of videos that a run may draw.

F latent frames  C channels  H W latent size
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from utils.limits import FRAMES, SIDE


@dataclass
class VideoSize:
    """frames, height, width: of latent videos, null for the data's own; weight: how often they are drawn, against the
    weights of the others."""

    frames: int | None = None
    height: int | None = None
    width: int | None = None
    weight: float = 1.0


def check_values(sizes: Sequence[VideoSize]) -> None:
    """Raises ValueError for a list that says nothing, or numbers that are no sizes and weights."""
    if not sizes:
        raise ValueError("sizes is empty: list sizes of videos, or set it to null for the data's own")
    for number, size in enumerate(sizes):
        for name in ("frames", "height", "width"):
            value = getattr(size, name)
            if value is not None and value < 1:
                raise ValueError(f"sizes[{number}].{name} must be at least 1, or null for the data's own, got {value}")
            limit = FRAMES if name == "frames" else SIDE
            if value is not None and value > limit:
                raise ValueError(
                    f"sizes[{number}].{name} must be at most {limit} (no real video is larger), got {value}: lower it"
                )
        if not 0 < size.weight < math.inf:
            raise ValueError(f"sizes[{number}].weight must be positive and finite, got {size.weight}")

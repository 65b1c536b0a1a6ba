"""Images of digits as a task: see worlds/digits.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from model.network import NetworkConfig
from tasks.data import Size
from tasks.world import WorldData, WorldTask
from worlds.digits import DigitsConfig, DigitsWorld
from worlds.digits_judge import DigitsJudge
from worlds.glyphs import GLYPH


@dataclass
class DigitsData(WorldData):
    """Scikit-learn's handwriting, as videos of one frame of 8x8. digits: the images."""

    kind: str = "digits"
    digits: DigitsConfig = field(default_factory=DigitsConfig)

    @property
    def size(self) -> Size:
        return 1, GLYPH, GLYPH

    @property
    def frames_key(self) -> str:
        return "data.kind digits"

    def task(self, student: NetworkConfig, seed: int, device: torch.device) -> DigitsTask:
        return DigitsTask(self, student, seed, device)

    def check_size(self, size: Size, *, stored: bool, with_image: bool) -> None:
        if size != self.size:
            raise ValueError("data.kind digits has images of one size: set training.sizes to null")


class DigitsTask(WorldTask):
    """scikit-learn's digits, videos of one frame."""

    world: DigitsWorld

    def __init__(self, config: DigitsData, student: NetworkConfig, seed: int, device: torch.device) -> None:
        super().__init__(DigitsWorld(config.digits), config, student, seed, device)

    def judge(self, cache: Path) -> DigitsJudge:
        return DigitsJudge(self.world, cache)

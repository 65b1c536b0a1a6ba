"""Images of digits as a task: see worlds/digits.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from model.types import LatentSize
from tasks.task import TaskContext
from tasks.world import WorldData, WorldTask
from worlds.digits import DigitsConfig, DigitsWorld
from worlds.digits_judge import DigitsJudge
from worlds.glyphs import GLYPH


@dataclass
class DigitsData(WorldData):
    """Scikit-learn's handwriting, as videos of one frame of 8x8. digits: the images."""

    suite: ClassVar[str | None] = "toy"
    packages: ClassVar[tuple[str, ...]] = ("scikit-learn",)  # its handwriting

    kind: str = "digits"
    digits: DigitsConfig = field(default_factory=DigitsConfig)

    @property
    def size(self) -> LatentSize:
        return 1, GLYPH, GLYPH

    def task(self, context: TaskContext) -> DigitsTask:
        return DigitsTask(self, context)

    def check_size(self, size: LatentSize, *, stored: bool, with_image: bool) -> None:
        if size != self.size:
            raise ValueError("data.kind digits has images of one size: set training.sizes to null")


class DigitsTask(WorldTask):
    """scikit-learn's digits, videos of one frame."""

    world: DigitsWorld

    def __init__(self, config: DigitsData, context: TaskContext) -> None:
        super().__init__(DigitsWorld(config.digits), config, context)

    def judge(self, cache: Path) -> DigitsJudge:
        return DigitsJudge(self.world, cache)

"""The world of shapes as a task: see worlds/shapes.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from model.network import NetworkConfig
from model.types import LatentSize
from tasks.task import TaskContext
from tasks.world import WorldData, WorldTask
from worlds.block_dct import BLOCK
from worlds.shapes import ShapesWorld, ShapesWorldConfig
from worlds.shapes_judge import ShapesJudge


@dataclass
class ShapesData(WorldData):
    """The world of shapes: one or two coloured shapes that glide over a calm torus. shapes: the world."""

    suite: ClassVar[str | None] = "toy"

    kind: str = "shapes"
    shapes: ShapesWorldConfig = field(default_factory=ShapesWorldConfig)

    @property
    def size(self) -> LatentSize:
        side = self.shapes.canvas // BLOCK
        return self.shapes.frames, side, side

    def task(self, context: TaskContext) -> ShapesTask:
        return ShapesTask(self, context)

    def text_identity(self) -> list[Any]:
        return [*super().text_identity(), self.shapes]

    def check_size(self, size: LatentSize, *, stored: bool, with_image: bool) -> None:
        frames, height, width = size
        if height != width:
            raise ValueError(f"the world of shapes is square, not {height}x{width}: give one height and width")
        replace(self.shapes, frames=frames, canvas=BLOCK * height)

    def resized(self, height: int, width: int, network: NetworkConfig) -> ShapesData:
        if height != width:
            raise ValueError("the world of shapes is square")
        return replace(self, shapes=replace(self.shapes, canvas=height))


class ShapesTask(WorldTask):
    """The world of shapes."""

    world: ShapesWorld

    def __init__(self, config: ShapesData, context: TaskContext) -> None:
        super().__init__(ShapesWorld(config.shapes), config, context)

    def judge(self, cache: Path) -> ShapesJudge:
        return ShapesJudge(self.world)

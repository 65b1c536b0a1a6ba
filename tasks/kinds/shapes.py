"""The world of shapes as a task: see worlds/shapes.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tasks.task import TaskContext
from tasks.world import SquareData, WorldTask
from worlds.block_dct import BLOCK
from worlds.shapes import ShapesWorld, ShapesWorldConfig
from worlds.shapes_judge import ShapesJudge


@dataclass
class ShapesData(SquareData):
    """The world of shapes: one or two coloured shapes that glide over a calm torus. shapes: the world."""

    suite: ClassVar[str | None] = "toy"
    called: ClassVar[str] = "the world of shapes"
    place: ClassVar[int] = BLOCK

    kind: str = "shapes"
    shapes: ShapesWorldConfig = field(default_factory=ShapesWorldConfig)

    def task(self, context: TaskContext) -> ShapesTask:
        return ShapesTask(self, context)


class ShapesTask(WorldTask):
    """The world of shapes."""

    world: ShapesWorld

    def __init__(self, config: ShapesData, context: TaskContext) -> None:
        super().__init__(ShapesWorld(config.shapes), config, context)

    def judge(self, cache: Path) -> ShapesJudge:
        return ShapesJudge(self.world)

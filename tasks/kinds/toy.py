"""The toy world as a task: see worlds/toy.py."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from model.network import NetworkConfig
from model.objective import RewardConfig
from model.types import LatentSize
from tasks.task import Reward, TaskContext
from tasks.world import WorldData, WorldTask
from utils.errors import ConfigError
from worlds.toy import ToyWorld, ToyWorldConfig
from worlds.toy_judge import ToyJudge


@dataclass
class ToyData(WorldData):
    """The toy world: a handwritten digit that glides over a small canvas. toy: the world."""

    suite: ClassVar[str | None] = "toy"

    kind: str = "toy"
    toy: ToyWorldConfig = field(default_factory=ToyWorldConfig)

    @property
    def size(self) -> LatentSize:
        side = self.toy.canvas // 2
        return self.toy.frames, side, side

    def task(self, context: TaskContext) -> ToyTask:
        return ToyTask(self, context)

    def text_identity(self) -> list[Any]:
        return [*super().text_identity(), self.toy]

    def check_size(self, size: LatentSize, *, stored: bool, with_image: bool) -> None:
        frames, height, width = size
        if height != width:
            raise ValueError(f"the toy world is square, not {height}x{width}: give one height and width")
        replace(self.toy, frames=frames, canvas=2 * height)

    def resized(self, height: int, width: int, network: NetworkConfig) -> ToyData:
        if height != width:
            raise ValueError("the toy world is square")
        return replace(self, toy=replace(self.toy, canvas=height))


class ToyTask(WorldTask):
    """The toy world."""

    world: ToyWorld

    def __init__(self, config: ToyData, context: TaskContext) -> None:
        super().__init__(ToyWorld(config.toy), config, context)

    def judge(self, cache: Path) -> ToyJudge:
        return ToyJudge(self.world, cache)

    def reward(self, config: RewardConfig | None) -> Reward | None:
        """The judge's 'prompt_adherence'. The judge is trained at first use and kept on disk."""
        if config is None:
            return None
        if config.name != "prompt_adherence":
            raise ConfigError(f"objective.reward.name '{config.name}' is unknown: the toy world has prompt_adherence")
        return ToyJudge(self.world, Path("logs/cache")).adherence

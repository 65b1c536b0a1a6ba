"""The toy world as a task: see worlds/toy.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from model.objective import RewardConfig
from tasks.task import Reward, TaskContext
from tasks.world import SquareData, WorldTask
from utils.errors import ConfigError
from worlds.toy import ToyWorld, ToyWorldConfig
from worlds.toy_judge import ToyJudge


@dataclass
class ToyData(SquareData):
    """The toy world: a handwritten digit that glides over a small canvas. toy: the world."""

    suite: ClassVar[str | None] = "toy"
    packages: ClassVar[tuple[str, ...]] = ("scikit-learn",)  # its handwriting
    called: ClassVar[str] = "the toy world"
    place: ClassVar[int] = 2

    kind: str = "toy"
    toy: ToyWorldConfig = field(default_factory=ToyWorldConfig)

    def task(self, context: TaskContext) -> ToyTask:
        return ToyTask(self, context)


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
